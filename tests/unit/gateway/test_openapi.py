"""Generated requests against the OpenAPI document: no 5xx, and answers as the document says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from jsonschema import Draft202012Validator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from starlette.routing import Route

from serve_app.gateway.chat.wire import IGNORED_PARAMETERS, ChatRequest
from serve_app.gateway.openapi import openapi_document
from tests.gateway_fakes import Loopback, gateway_config, running_gateway

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with running_gateway(tmp_path_factory.mktemp("openapi")) as loopback:
        yield loopback


def document(mode: Any = "open") -> dict[str, Any]:
    return openapi_document(gateway_config().gateway.limits, mode)


schema = schemathesis.openapi.from_dict(document())


@schema.parametrize()
@settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_generated_requests_are_answered_as_documented(case: Any, gateway: Loopback) -> None:
    response = case.call(base_url=gateway.url)
    if response.status_code == 504:
        # The generated deadline was shorter than this machine needed.
        assert response.json()["error"]["code"] == "deadline_exceeded"
        return
    case.validate_response(response, checks=CHECKS)


def test_the_document_is_served_and_has_the_configured_limits(gateway: Loopback) -> None:
    served = httpx2.get(gateway.url + "/openapi.json").json()
    assert served == document()
    limits = gateway.config.gateway.limits
    chat = served["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"maximum": limits.max_n, "minimum": 1, "type": "integer"} in chat["n"]["anyOf"]
    assert chat["messages"]["maxItems"] == limits.max_messages


def test_every_route_is_in_the_document_and_nothing_else(gateway: Loopback) -> None:
    documented = {
        (method.upper(), path.split("{")[0])
        for path, operations in document()["paths"].items()
        for method in operations
    }
    routes = {
        (method, route.path.split("{")[0])
        for route in gateway.app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert documented == routes


def test_every_schema_in_the_document_is_valid() -> None:
    for definition in document()["components"]["schemas"].values():
        Draft202012Validator.check_schema(definition)


def test_keys_are_in_the_document_only_where_they_are_asked_for() -> None:
    assert "securitySchemes" not in document("open")["components"]
    locked = document("required")
    needs_key = {
        path
        for path, operations in locked["paths"].items()
        for operation in operations.values()
        if "security" in operation
    }
    assert needs_key == {path for path in locked["paths"] if path.startswith("/v1/")}


def test_parameters_that_are_not_acted_on_are_named_as_such() -> None:
    for name in IGNORED_PARAMETERS:
        assert ChatRequest.model_fields[name].description == "Accepted, not used."
