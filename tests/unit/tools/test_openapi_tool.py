"""Operations of an OpenAPI file as functions, called on a real server on loopback."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from serve_app.config.tools import OpenApiConfig
from serve_app.errors import ToolFailed, ToolRetry, ToolTimeout
from serve_app.tools.base import Function, ToolResult
from serve_app.tools.openapi.document import MAX_YAML_BYTES, SpecError, read_document
from serve_app.tools.openapi.operations import MAX_FUNCTIONS
from serve_app.tools.openapi.tool import OpenApiTool
from serve_app.tools.runner import ToolRunner
from serve_app.tools.web.page import UNTRUSTED
from tests.web_fakes import Site, raw_server, running_site

Json = dict[str, Any]

STRING: Json = {"type": "string"}
CUSTOMERS: Json = {
    "openapi": "3.0.3",
    "info": {"title": "CRM", "version": "1"},
    "servers": [{"url": "https://crm.example/v2"}],
    "paths": {
        "/customers/{id}": {
            "parameters": [{"$ref": "#/components/parameters/Id"}],
            "get": {
                "operationId": "getCustomer",
                "summary": "Read a customer.",
                "parameters": [
                    {"name": "fields", "in": "query", "schema": {"type": "array", "items": STRING}},
                    {"name": "X-Trace", "in": "header", "schema": STRING},
                ],
            },
            "put": {
                "operationId": "putCustomer",
                "requestBody": {
                    "required": True,
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Customer"}}
                    },
                },
            },
            "delete": {"operationId": "deleteCustomer"},
        },
        "/customers": {
            "get": {
                "operationId": "find customers",
                "parameters": [
                    {"name": "q", "in": "query", "required": True, "schema": STRING},
                    {"name": "open", "in": "query", "schema": {"type": "boolean"}},
                    {
                        "name": "ids",
                        "in": "query",
                        "explode": False,
                        "schema": {"type": "array", "items": {"type": "integer"}},
                    },
                    {
                        "name": "filter",
                        "in": "query",
                        "style": "deepObject",
                        "schema": {"type": "object", "properties": {"city": STRING}},
                    },
                    {
                        "name": "sort",
                        "in": "query",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    },
                ],
            },
            "head": {"operationId": "countCustomers"},
            "post": {
                "operationId": "addCustomer",
                "requestBody": {"$ref": "#/components/requestBodies/Customer"},
            },
            "patch": {"operationId": "touchCustomers"},
        },
    },
    "components": {
        "parameters": {"Id": {"name": "id", "in": "path", "required": True, "schema": STRING}},
        "requestBodies": {
            "Customer": {
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/Customer"}}
                }
            }
        },
        "schemas": {
            "Customer": {
                "type": "object",
                "required": ["name", "created"],
                "properties": {
                    "name": {"type": "string", "maxLength": 80, "pattern": "^(a+)+$"},
                    "created": {"type": "string", "format": "date-time", "readOnly": True},
                    "age": {
                        "type": "integer",
                        "minimum": 0,
                        "exclusiveMinimum": True,
                        "nullable": True,
                    },
                    "friends": {
                        "type": "array",
                        "items": {"$ref": "#/components/schemas/Customer"},
                    },
                },
            }
        },
    },
}


@pytest.fixture
def site() -> Iterator[Site]:
    with running_site() as running:
        yield running


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., OpenApiTool]:
    def tool(document: Json | str | None = None, **settings: Any) -> OpenApiTool:
        path = tmp_path / "openapi.json"
        text = document if isinstance(document, str) else json.dumps(document or CUSTOMERS)
        path.write_text(text)
        return OpenApiTool(
            OpenApiConfig(tool_id="crm", description="Customers.", spec=path, **settings)
        )

    return tool


def function(tool: OpenApiTool, name: str) -> Function:
    return {f.name: f for f in tool.functions()}[f"crm__{name}"]


def call(tool: OpenApiTool, name: str, **arguments: Any) -> ToolResult:
    jsonschema.validate(arguments, function(tool, name).parameters)
    return tool.call(f"crm__{name}", arguments, 60.0)


def document_of(operation: Json | None = None, path: str = "/x", **changes: Any) -> Json:
    """A file of one operation."""
    return {
        "openapi": "3.1.0",
        "servers": [{"url": "https://crm.example"}],
        "paths": {path: {"get": {"operationId": "op", **(operation or {})}}},
        **changes,
    }


def query(schema: object) -> Json:
    return {"parameters": [{"name": "p", "in": "query", "schema": schema}]}


def test_each_operation_is_a_function_with_its_effects(make: Callable[..., OpenApiTool]) -> None:
    found = {f.name: str(f.effects) for f in make().functions()}
    assert found == {
        "crm__getCustomer": "none",
        "crm__putCustomer": "idempotent",
        "crm__deleteCustomer": "idempotent",
        "crm__find_customers": "none",
        "crm__countCustomers": "none",
        "crm__addCustomer": "once",
        "crm__touchCustomers": "once",
    }


def test_settings_choose_operations_and_their_effects(make: Callable[..., OpenApiTool]) -> None:
    tool = make(
        operations=["find customers", "addCustomer"],
        operation_effects={"addCustomer": "idempotent"},
    )
    assert {f.name: str(f.effects) for f in tool.functions()} == {
        "crm__find_customers": "none",
        "crm__addCustomer": "idempotent",
    }


def test_schema_has_references_written_out_and_takes_nothing_else(
    make: Callable[..., OpenApiTool],
) -> None:
    added = function(make(), "addCustomer")
    customer = added.parameters["properties"]["body"]
    assert added.parameters["additionalProperties"] is False
    assert added.parameters["required"] == []
    assert customer == {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "maxLength": 80},
            "age": {"type": ["integer", "null"], "exclusiveMinimum": 0},
            "friends": {"type": "array", "items": {}},
        },
        "additionalProperties": False,
    }
    read = function(make(), "getCustomer")
    assert read.description == "Read a customer."
    assert set(read.parameters["properties"]) == {"id", "fields"}
    assert read.parameters["required"] == ["id"]
    for each in make().functions():
        jsonschema.Draft202012Validator.check_schema(each.parameters)


def test_parts_of_an_all_of_do_not_shut_each_other_out(make: Callable[..., OpenApiTool]) -> None:
    part = {"type": "object", "properties": {"a": STRING}}
    other = {"type": "object", "properties": {"b": STRING}}
    (found,) = make(document_of(query({"allOf": [part, other]}))).functions()
    jsonschema.validate({"p": {"a": "1", "b": "2"}}, found.parameters)


def test_yaml_is_read_as_json_is(make: Callable[..., OpenApiTool]) -> None:
    assert make(yaml.safe_dump(CUSTOMERS, sort_keys=False)).functions() == make().functions()


def test_names_are_of_plain_letters_short_and_unique(make: Callable[..., OpenApiTool]) -> None:
    ids = ["a b", "a/b", "a_b", "x" * 100, "x" * 101, "\u00e4", "", "__"]
    document = document_of()
    document["paths"] = {
        f"/{number}": {"get": {"operationId": operation_id}}
        for number, operation_id in enumerate(ids)
    }
    document["paths"]["/unnamed/{id}"] = {
        "post": {"parameters": [{"name": "id", "in": "path", "schema": STRING}]}
    }
    names = [f.name for f in make(document).functions()]
    assert len(set(names)) == len(ids) + 1
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in names)
    assert names == [f.name for f in make(document).functions()]
    assert names[-1] == "crm__post_unnamed_id"


def test_values_stay_values_in_the_path_and_the_query(
    make: Callable[..., OpenApiTool], site: Site
) -> None:
    tool = make(server=f"{site.url}/v2")
    for value, encoded in (
        ("a/b", "a%2Fb"),
        ("?x=1#y", "%3Fx%3D1%23y"),
        ("%2e%2e%2f", "%252e%252e%252f"),
        ("\u00e4 ;&", "%C3%A4%20%3B%26"),
        ("..a", "..a"),
    ):
        site.page(f"/v2/customers/{encoded}", "{}", "application/json")
        call(tool, "getCustomer", id=value, fields=["a&b=c", "d"])
        assert site.requests[-1].path == f"/v2/customers/{encoded}?fields=a%26b%3Dc&fields=d"
    site.page("/v2/customers", "{}", "application/json")
    call(tool, "find_customers", q="x&open=false", open=True, ids=[1, 2], filter={"city": "a&b"},
         sort={"by": "name"})  # fmt: skip
    assert site.requests[-1].path == (
        "/v2/customers?q=x%26open%3Dfalse&open=true&ids=1%2C2&filter%5Bcity%5D=a%26b"
        "&sort=%7B%22by%22%3A%22name%22%7D"
    )


@pytest.mark.parametrize(
    "value", ["..", ".", "", "../admin", "a/../b", "..\\x", "a/..", "a\nb", "a\0", "\ud800"]
)
def test_a_value_that_would_change_the_path_is_refused(
    make: Callable[..., OpenApiTool], site: Site, value: str
) -> None:
    with pytest.raises(ToolRetry):
        call(make(server=site.url), "getCustomer", id=value)
    assert site.requests == []


def test_two_values_cannot_make_a_step_up_together(
    make: Callable[..., OpenApiTool], site: Site
) -> None:
    parameters = [{"name": name, "in": "path", "schema": STRING} for name in "ab"]
    tool = make(document_of({"parameters": parameters}, "/x/{a}{b}/y"), server=site.url)
    with pytest.raises(ToolRetry):
        call(tool, "op", a=".", b=".")
    assert site.requests == []


def test_body_goes_as_json_with_the_methods_of_the_file(
    make: Callable[..., OpenApiTool], site: Site
) -> None:
    site.page("/customers", "", None, 201)
    site.page("/customers/7", '{"id": 7}', "application/json")
    tool = make(server=site.url)
    assert call(tool, "addCustomer", body={"name": "\u00c4nne", "age": None}).text == (
        "done: HTTP 201"
    )
    assert call(tool, "putCustomer", id="7", body={"name": "a"}).text == f'{UNTRUSTED}\n{{"id":7}}'
    assert call(tool, "deleteCustomer", id="7").data == {"status": 200}
    assert call(tool, "countCustomers").text == "done: HTTP 201"
    assert [(r.method, r.body) for r in site.requests] == [
        ("POST", '{"name":"\u00c4nne","age":null}'.encode()),
        ("PUT", b'{"name":"a"}'),
        ("DELETE", b""),
        ("HEAD", b""),
    ]
    assert site.requests[0].headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"id": 5},
        {"id": "x", "X-Trace": "y"},
        {"id": "x", "Authorization": "y"},
        {"id": "x", "body": {}},
        {"id": "x", "fields": "a"},
    ],
    ids=str,
)
def test_arguments_beyond_the_file_are_refused(
    make: Callable[..., OpenApiTool], arguments: Json
) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(arguments, function(make(), "getCustomer").parameters)


def test_headers_come_from_the_settings_and_their_secrets_stay_there(
    make: Callable[..., OpenApiTool], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRM_KEY", "s3cret-key")
    headers = {"Authorization": "Bearer ${CRM_KEY}", "X-Client": "atlas", "accept": "a/b"}
    tool = make(server=site.url, headers=headers)
    site.page("/customers/1", '{"you sent": "Bearer s3cret-key"}', "application/json")
    site.page("/customers/2", "unknown key s3cret-key", "text/plain", 403)
    assert call(tool, "getCustomer", id="1").text == (
        f'{UNTRUSTED}\n{{"you sent":"Bearer [secret]"}}'
    )
    assert site.requests[0].headers["Authorization"] == "Bearer s3cret-key"
    assert site.requests[0].headers["X-Client"] == "atlas"
    assert site.requests[0].headers["accept"] == "a/b"
    assert "Accept" not in site.requests[0].headers
    with pytest.raises(ToolRetry) as refused:
        call(tool, "getCustomer", id="2")
    assert refused.value.message == "the server answers 403: unknown key [secret]"
    assert "s3cret-key" not in tool.config.model_dump_json()


@pytest.mark.parametrize("value", [None, "", "a\nb", "\u00e4"])
def test_a_secret_that_is_not_there_fails_by_its_name(
    make: Callable[..., OpenApiTool], site: Site, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("CRM_KEY", raising=False)
    if value is not None:
        monkeypatch.setitem(os.environ, "CRM_KEY", value)
    tool = make(server=site.url, headers={"Authorization": "${CRM_KEY}"})
    with pytest.raises(ToolFailed, match="'CRM_KEY' holds no value"):
        call(tool, "getCustomer", id="1")
    assert site.requests == []


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (400, ToolRetry, "the server answers 400: no such field"),
        (404, ToolRetry, "the server answers 404: no such field"),
        (422, ToolRetry, "the server answers 422: no such field"),
        (401, ToolFailed, "tool 'crm': the server answers 401"),
        (429, ToolFailed, "tool 'crm': the server answers 429"),
        (500, ToolFailed, "tool 'crm': the server answers 500"),
        (302, ToolFailed, "tool 'crm': the server answers 302 with a redirect, "
         "which is not followed"),
    ],
)  # fmt: skip
def test_what_the_server_refuses_is_for_the_model_and_what_it_breaks_is_not(
    make: Callable[..., OpenApiTool],
    site: Site,
    status: int,
    error: type[ToolRetry | ToolFailed],
    message: str,
) -> None:
    site.page("/customers/1", "no such field", "text/plain", status, Location="/elsewhere")
    with pytest.raises(error) as failed:
        call(make(server=site.url), "getCustomer", id="1")
    assert failed.value.message == message
    assert len(site.requests) == 1


def test_answers_are_cut(make: Callable[..., OpenApiTool], site: Site) -> None:
    site.page("/customers/1", json.dumps(["x"] * 10_000), "application/json")
    site.page("/customers/2", "y" * 10_000, "text/plain", 400)
    site.page("/customers/3", b"\x89PNG", "image/png")
    tool = make(server=site.url, max_result_chars=200)
    assert len(call(tool, "getCustomer", id="1").text) == 200
    assert call(tool, "getCustomer", id="3").text.endswith("[4 bytes of 'image/png']")
    with pytest.raises(ToolRetry) as refused:
        call(tool, "getCustomer", id="2")
    assert len(refused.value.message) < 600
    with pytest.raises(ToolFailed, match="larger than 1024 bytes"):
        call(make(server=site.url, max_bytes=1024), "getCustomer", id="1")


def test_no_server_fails_and_a_slow_one_ends_at_the_deadline(
    make: Callable[..., OpenApiTool],
) -> None:
    with running_site() as gone:
        pass
    with pytest.raises(ToolFailed, match="no answer"):
        call(make(server=gone.url), "getCustomer", id="1")
    with raw_server(lambda: iter(lambda: b"", None)) as port, pytest.raises(ToolTimeout):
        make(server=f"http://127.0.0.1:{port}").call("crm__getCustomer", {"id": "1"}, 0.3)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (document_of(query({"$ref": "other.yaml#/X"})), "leads out of the file"),
        (document_of(query({"$ref": "https://evil.test/x.json"})), "leads out of the file"),
        (document_of(query({"$ref": "file:///etc/passwd"})), "leads out of the file"),
        (document_of(query({"$ref": "#/components/schemas/X"})), "leads to nothing"),
        (document_of(query({"$ref": 5})), "leads out of the file"),
        (
            document_of(
                query({"$ref": "#/x/a"}),
                x={"a": {"$ref": "#/x/b"}, "b": {"$ref": "#/x/a"}},
            ),
            "leads to itself",
        ),
        (document_of(paths={"/x": {"$ref": "other.yaml"}}), "leads out of the file"),
        (document_of({"parameters": [{"$ref": "other.yaml"}]}), "leads out of the file"),
        (document_of(query({"type": "file"})), "unknown type"),
        (document_of(query({"enum": [{"a": 1}]})), "enum"),
        (document_of(query("text")), "an object is expected"),
        (document_of(servers=[{"url": "https://{region}.crm.example"}]), "variables"),
        (document_of(servers=[{"url": "https://a.test", "variables": {"x": {}}}]), "variables"),
        (document_of(servers=[{"url": "/v2"}]), "cannot be used"),
        (document_of(servers=[{"url": "http://user@crm.example"}]), "cannot be used"),
        (document_of(servers=[{"url": "http://0x7f.1"}]), "cannot be used"),
        (document_of(servers=[{"url": "https://crm.example/?x="}]), "query"),
        (document_of(servers=[]), "missing"),
        (document_of(servers="x"), "missing"),
        (document_of(paths={}), "no operations"),
        (document_of(paths=5), "no operations"),
        (document_of(openapi="2.0"), "not of OpenAPI 3.0"),
        ("[]", "not of OpenAPI 3.0"),
        ("swagger: '2.0'", "not of OpenAPI 3.0"),
        ("{", "neither JSON nor YAML"),
        ("a: [", "neither JSON nor YAML"),
        ("[" * 100_000, "neither JSON nor YAML"),
        ("{" + '"a":{' * 100_000, "neither JSON nor YAML"),
        ("a: !!python/object/apply:os.system ['true']", "neither JSON nor YAML"),
        ("a: &a [*a]", "not of OpenAPI 3.0"),
        ("# " + "x" * MAX_YAML_BYTES, "convert it to JSON"),
        (document_of(path="x"), "its path is none"),
        (document_of(path="/x?y=1"), "its path is none"),
        (document_of(path="/{id}"), "differ"),
        (document_of({"servers": [{"url": "https://evil.test"}]}), "server of its own"),
        (
            document_of({"parameters": [{"name": "k", "in": "cookie", "required": True}]}),
            "needs the cookie 'k'",
        ),
        (
            document_of({"parameters": [{"name": "K", "in": "header", "required": True}]}),
            "needs the header 'K'",
        ),
        (
            document_of({"parameters": [{"name": "k", "in": "query", "style": "pipeDelimited"}]}),
            "style",
        ),
        (
            document_of(
                {
                    "parameters": [
                        {"name": "id", "in": "query", "schema": STRING},
                        {"name": "id", "in": "path", "schema": STRING},
                    ]
                },
                "/{id}",
            ),
            "two parameters 'id'",
        ),
        (
            document_of(
                paths={"/x": {"post": {"requestBody": {"content": {"text/xml": {}}}}}},
            ),
            "takes no JSON",
        ),
        (document_of(query({"enum": ["x" * 200] * 200})), "larger than"),
        (document_of(query({"minimum": float("nan")})), "a number that is none"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(
    make: Callable[..., OpenApiTool], document: Json | str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ToolFailed, match=reason) as refused:
        make(document).functions()
    assert len(refused.value.message) < 500
    assert str(tmp_path) not in refused.value.message


def wide(depth: int) -> Json:
    """Schemas of which each names the next one eight times."""
    return {
        f"S{level}": {
            "type": "object",
            "properties": {
                f"p{n}": {"$ref": f"#/components/schemas/S{level + 1}"} for n in range(8)
            },
        }
        for level in range(depth)
    } | {f"S{depth}": STRING}


def test_schemas_that_grow_without_bound_are_refused_quickly(
    make: Callable[..., OpenApiTool],
) -> None:
    document = document_of(
        query({"$ref": "#/components/schemas/S0"}), components={"schemas": wide(30)}
    )
    begin = time.process_time()
    with pytest.raises(ToolFailed, match="too large or too deep"):
        make(document).functions()
    assert time.process_time() - begin < 10


def test_yaml_that_grows_by_its_anchors_is_refused_quickly(
    make: Callable[..., OpenApiTool],
) -> None:
    lines = ["openapi: 3.1.0", "servers: [{url: 'https://a.test'}]", "a0: &a0 {type: string}"]
    for level in range(1, 30):
        fields = ", ".join(f"p{n}: *a{level - 1}" for n in range(8))
        lines.append(f"a{level}: &a{level} {{type: object, properties: {{{fields}}}}}")
    lines.append("m0: &m0 {x: 1}")
    lines += [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12)]
    lines.append("paths: {/x: {get: {parameters: [{name: p, in: query, schema: *a29}]}}}")
    begin = time.process_time()
    with pytest.raises(ToolFailed, match="too large or too deep"):
        make("\n".join(lines)).functions()
    assert time.process_time() - begin < 10


def test_ten_thousand_operations_are_refused_quickly_and_some_of_them_can_be_named(
    make: Callable[..., OpenApiTool],
) -> None:
    document = document_of(
        paths={f"/{n}": {"get": {"operationId": f"op{n}"}} for n in range(10_000)}
    )
    begin = time.process_time()
    with pytest.raises(ToolFailed, match=f"10000 operations; name at most {MAX_FUNCTIONS}"):
        make(document).functions()
    assert time.process_time() - begin < 10
    named = make(document, operations=["op9999", "op3"])
    assert [f.name for f in named.functions()] == ["crm__op3", "crm__op9999"]
    with pytest.raises(ToolFailed, match="no operation 'absent'"):
        make(document, operations=["absent"]).functions()


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, tmp_path / "absent", Path("/dev/zero"), Path("/proc/self/mem")):
        with pytest.raises(SpecError) as refused:
            read_document(path)
        assert str(path) not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"description": ""},
        {"spec": None},
        {"server": "https://{region}.crm.example"},
        {"server": "https://user:secret@crm.example"},
        {"server": "https://crm.example/?x=1"},
        {"operations": []},
        {"headers": {"Host": "x"}},
        {"headers": {"content-length": "5"}},
        {"headers": {"X": "a\r\nY: b"}},
        {"headers": {"X Y": "a"}},
        {"headers": {"X": "a", "x": "b"}},
        {"effects": "once"},
        {"operations": ["a"], "operation_effects": {"b": "none"}},
        {"operation_effects": {"a": "often"}},
        {"kind": "context"},
        {"top_k": 0},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: Json) -> None:
    whole = {"tool_id": "crm", "description": "x", "spec": "/srv/crm.yaml", **settings}
    with pytest.raises(ValidationError):
        OpenApiConfig.model_validate(whole)


def test_a_broken_file_breaks_its_tool_alone(tmp_path: Path) -> None:
    broken = OpenApiConfig(tool_id="crm", description="x", spec=tmp_path / "absent.json")
    runner = ToolRunner([broken])
    assert runner.tool("crm").tool_id == "crm"
    for _ in range(2):
        with pytest.raises(ToolFailed, match=r"^tool 'crm': the OpenAPI file cannot be read$"):
            runner.functions("crm")
