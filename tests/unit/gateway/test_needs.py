"""What nothing that may answer can take is a 400 that names the field, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.config import AtlasConfig
from serve_app.config.patterns.check import members_of_patterns
from serve_app.errors import ContextTooLong, InvalidRequest
from serve_app.gateway.chat.pool_view import PoolView
from serve_app.schemas import ChatCall, Limits, MemberState, ModelMember, PoolState
from tests.pictures import asking

LOOK = {"ask": {"pair": "eye", "prompt": "{{question}}"}}
READ = {"ask": {"pair": "text", "prompt": "{{question}}"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
FUNCTION = {"type": "function", "function": {"name": "f"}}
LONG = {"role": "user", "content": "abcdefgh" * 101}


def view(state: MemberState = MemberState.READY) -> PoolView:
    """A model that sees and does nothing else, one that does all else, and two patterns."""
    remote = {"type": "remote", "base_url": "http://127.0.0.1:1/v1", "remote_model": "x"}
    eye = {"vision": True, "json_schema": False, "tools": False, "context_tokens": 100}
    config = AtlasConfig.model_validate(
        {
            "models": [
                remote | {"model_id": "eye", "capabilities": eye, "tools": ["none", "handbook"]},
                remote | {"model_id": "text", "capabilities": {"context_tokens": 50}},
            ],
            "tools": [{"type": "retrieval", "tool_id": "handbook", "corpus": "./x"}],
            "patterns": [
                {"name": "look", "do": [LOOK]},
                {"name": "read", "do": [LOOK, READ], "routable": False},
            ],
        }
    )
    pool = PoolState(
        1,
        tuple(ModelMember(name, state if name == "eye" else MemberState.READY)
              for name in ("eye", "text")),
        ("none", "handbook"),
        config.all_pairs(),
        patterns=members_of_patterns(config),
    )  # fmt: skip
    return PoolView(pool, config)


def call(
    model: str = "atlas",
    message: dict[str, Any] | None = None,
    tools: tuple[Any, ...] = (),
    allow: dict[str, Any] | None = None,
    **sampling: Any,
) -> ChatCall:
    limits = Limits(alpha=0.0, deadline_s=9.0, **(allow or {}))
    messages = (message or {"role": "user", "content": "hi"},)
    return ChatCall("req_1", model, messages, sampling, limits, tools=tools)


TEXT_ONLY = {"models": frozenset({"text"})}
EYE_ONLY = {"models": frozenset({"eye"})}


@pytest.mark.parametrize(
    "taken",
    [
        call(message=asking()),
        call("eye", asking()),
        call("eye@handbook", asking()),
        call("pattern:look", asking()),
        call(message=asking(), allow={"models": frozenset({"pattern:look"})}),
        call(response_format=SCHEMA),
        call("text", response_format=SCHEMA),
        call("eye", response_format={"type": "json_object"}),
        call(tools=(FUNCTION,)),
        call("text", tools=(FUNCTION,)),
        call("eye", {"role": "user", "content": "abcdefgh" * 100}),
        call("text", {"role": "user", "content": " " * 100_000}),
    ],
)
def test_what_one_that_may_answer_can_take_is_let_through(taken: ChatCall) -> None:
    view().check(taken)


@pytest.mark.parametrize(
    ("refused", "field", "says"),
    [
        (call("text", asking()), "messages", "the model 'text' cannot look at pictures"),
        (call("pattern:read", asking()), "messages", "'pattern:read' cannot look at pictures"),
        (call(message=asking(), allow=TEXT_ONLY), "messages", "no model that may answer can look"),
        (call("eye", response_format=SCHEMA), "response_format", "'eye' cannot be held to a JSON"),
        (call(response_format=SCHEMA, allow=EYE_ONLY), "response_format", "no model that may"),
        (call("eye@none", tools=(FUNCTION,)), "tools", "'eye' cannot call functions"),
        (call(tools=(FUNCTION,), allow=EYE_ONLY), "tools", "no model that may answer can call"),
        (call(message=asking(), tools=(FUNCTION,)), "tools", "no model that may answer can call"),
    ],
)
def test_what_nothing_that_may_answer_can_take_is_refused_at_its_field(
    refused: ChatCall, field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        view().check(refused)
    assert (caught.value.param, caught.value.status_code) == (field, 400)


@pytest.mark.parametrize("model", ["eye", "text", "eye@handbook"])
def test_a_conversation_longer_than_a_context_is_refused_with_openais_code(model: str) -> None:
    with pytest.raises(ContextTooLong, match="cannot take a conversation of 101 tokens") as caught:
        view().check(call(model, LONG))
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


def test_one_that_could_and_does_not_answer_yet_is_no_fault_of_the_callers() -> None:
    view(MemberState.STARTING).check(call(message=asking()))


def test_where_the_lists_admit_nobody_the_router_has_the_word() -> None:
    view().check(call(message=asking(), allow={"tools": frozenset({"handbook"}), **TEXT_ONLY}))


def test_an_admin_sees_what_each_model_can_take() -> None:
    eye, text = (row["capabilities"] for row in view().admin_models())
    assert eye == {"vision": True, "json_schema": False, "tools": False, "context_tokens": 100}
    assert text == {"vision": False, "json_schema": True, "tools": True, "context_tokens": 50}


def test_a_picture_for_the_router_is_taken_where_a_tool_reads_pictures() -> None:
    settings = {
        "models": [
            {
                "type": "remote",
                "model_id": "text",
                "base_url": "http://127.0.0.1:1/v1",
                "remote_model": "x",
                "tools": ["none", "ocr"],
            }
        ],
        "tools": [{"type": "ocr", "tool_id": "ocr"}],
    }
    config = AtlasConfig.model_validate(settings)
    member = ModelMember("text", MemberState.READY)
    reads = PoolView(PoolState(1, (member,), ("none", "ocr"), config.all_pairs()), config)
    reads.check(call(message=asking()))
    reads.check(call())
    with pytest.raises(InvalidRequest, match="cannot answer without a picture"):
        reads.check(call("text@ocr"))
