"""A running graph without keys: Serve listens on loopback, and every `Host` is looked at."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx2
import pytest

from serve_app.gateway.deployment import http_address
from tests.conftest import Graph

pytestmark = pytest.mark.serve


def test_serve_says_where_it_listens(graph: Graph) -> None:
    assert http_address() == ("127.0.0.1", urlsplit(graph.url).port)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "attacker.example"}, 421),
        ({"x-forwarded-for": "203.0.113.9"}, 403),
    ],
)
def test_behind_haproxy_only_loopback_callers_and_names_are_answered(
    graph: Graph, headers: dict[str, str], status: int
) -> None:
    response = httpx2.get(f"{graph.url}/v1/models", headers=headers, timeout=20)
    assert response.status_code == status
