"""Generated requests against the OpenAPI document: no 5xx, and answers as the document says."""

from __future__ import annotations

import json
import re
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

from serve_app.gateway.app import build_api
from serve_app.gateway.chat.wire import IGNORED_PARAMETERS
from serve_app.gateway.edge.operation import Operation
from serve_app.gateway.edge.routes import PUBLIC, Endpoint
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


def described() -> list[tuple[Endpoint, Operation]]:
    """The routes of the document, and what it says of them."""
    return [(route, route.operation) for route in table() if route.operation is not None]


def table() -> list[Endpoint]:
    """The routes; declaring them asks nothing of what their handlers work with."""
    nothing: Any = None
    app = build_api(nothing, nothing, nothing, nothing, gateway_config())
    found = [route for route in app.routes if isinstance(route, Endpoint)]
    assert len(found) == len(app.routes)
    return found


def document(mode: Any = "open") -> dict[str, Any]:
    return openapi_document(table(), gateway_config().gateway.limits, mode)


schema = schemathesis.openapi.from_dict(document())


@schema.parametrize()
@settings(
    max_examples=20,
    derandomize=True,
    database=None,
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


def test_only_the_route_that_describes_itself_is_left_out_of_the_document() -> None:
    left_out = {route.path for route in table() if route.operation is None}
    assert {path for path in left_out if not path.startswith("/console")} == {
        "/mcp",
        "/",
        "/metrics",
    }
    assert "`/mcp`" in document()["info"]["description"]


def test_every_other_route_is_in_the_document_and_nothing_else() -> None:
    documented = {
        (method.upper(), path): operation
        for path, operations in document()["paths"].items()
        for method, operation in operations.items()
    }
    routes = {(route.method, route.path_format): operation for route, operation in described()}
    assert documented.keys() == routes.keys()
    assert len(routes) == len(described())
    for key, operation in documented.items():
        assert operation["operationId"] == routes[key].operation_id


def test_an_operation_has_a_name_of_its_own() -> None:
    names = [operation.operation_id for _, operation in described()]
    assert len(names) == len(set(names))


def test_a_route_that_reads_a_body_says_what_it_is() -> None:
    for route, operation in described():
        assert (operation.body is not None) == route.rule.reads_body, route.path


def test_a_status_is_that_of_an_answer_or_of_an_error_and_said_once() -> None:
    for route, declared in described():
        answers = [answer.status for answer in (declared.answer, *declared.also)]
        assert len({*answers, *declared.errors}) == len(answers) + len(declared.errors), route.path


def test_every_reference_leads_to_a_schema() -> None:
    written = document()
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(written)))
    assert references <= written["components"]["schemas"].keys()


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
    assert needs_key == {
        route.path_format for route, _ in described() if route.rule.access != PUBLIC
    }


def test_parameters_that_are_not_acted_on_are_named_as_such() -> None:
    parameters = document()["components"]["schemas"]["ChatRequest"]["properties"]
    for name in IGNORED_PARAMETERS:
        assert parameters[name]["description"] == "Accepted, not used."
