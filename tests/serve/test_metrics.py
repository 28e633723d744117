"""The running graph tells its metrics: every process's, over Ray, on one page."""

from __future__ import annotations

import time

import httpx2
import pytest

from serve_app.telemetry import (
    GATEWAY_COST_USD,
    GATEWAY_REQUESTS,
    MODEL_CALLS,
    POLICY_VERSION,
    POOL_STATE,
    ROUTER_DECISIONS,
    RUN_STEPS,
)
from tests.conftest import Graph
from tests.telemetry_fakes import Samples, samples_of

pytestmark = pytest.mark.serve

TOLD = {
    *(of.exported + "_total" for of in (GATEWAY_COST_USD, GATEWAY_REQUESTS, MODEL_CALLS)),
    *(of.exported + "_total" for of in (ROUTER_DECISIONS, RUN_STEPS)),
    POLICY_VERSION.exported,
    POOL_STATE.exported,
}


def page(graph: Graph) -> Samples:
    response = httpx2.get(f"{graph.url}/metrics", timeout=60)
    assert response.status_code == 200
    return samples_of(response.text)


def test_a_request_is_told_within_a_while(graph: Graph) -> None:
    graph.client().chat.completions.create(
        model="scripted-echo", messages=[{"role": "user", "content": "Hello?"}]
    )
    ends_s = time.monotonic() + 120
    while not page(graph).keys() >= TOLD:
        assert time.monotonic() < ends_s, TOLD - page(graph).keys()
        time.sleep(1)
    labels = {name for found in page(graph).values() for key in found for name, _ in key}
    assert labels.isdisjoint({"WorkerId", "NodeAddress", "SessionName", "otel_scope_name"})
