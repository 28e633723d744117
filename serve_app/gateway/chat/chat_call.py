"""From a wire model to a `ChatCall`: what spans fields, or depends on the configuration.

In comes a `ChatRequest` whose fields are right each by itself; out goes a call in which they are
right together and within the limits, in the shape that engines take.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from serve_app.config import LimitsConfig
from serve_app.content import Content, pictures_of, text_of_content
from serve_app.errors import DeadlineExceeded, InvalidRequest
from serve_app.gateway.chat.pictures import check_picture
from serve_app.gateway.chat.wire import (
    AssistantMessage,
    AtlasOptions,
    ChatRequest,
    InstructionMessage,
    JsonSchemaResponseFormat,
    NamedToolChoice,
    PicturePart,
    TextPart,
    ToolMessage,
)
from serve_app.purse import Purse
from serve_app.schema_check import SchemaBudget
from serve_app.schemas import ChatCall, Fixed, Limits
from serve_app.trace_context import TraceContext


def to_chat_call(
    request: ChatRequest,
    *,
    request_id: str,
    owner: str,
    default_alpha: float,
    limits: LimitsConfig,
    elapsed_s: float = 0.0,
    begin_effect: Callable[[], Awaitable[None]] | None = None,
    purse: Purse | None = None,
    trace: TraceContext | None = None,
) -> ChatCall:
    """Check what spans fields or depends on the configuration, and build the call.

    Args:
        request: The body.
        request_id: The server's own id of the request.
        owner: Id of the caller's key.
        default_alpha: The cost-quality dial where the caller names none.
        limits: The bounds.
        elapsed_s: Seconds since the request arrived; the call's deadline is what is left.
        begin_effect: Of the request's idempotency key; `None`: the request came without one.
        purse: What the request is paid from; `None`: nothing limits its key.
        trace: The W3C trace that the request belongs to; `None`: nothing is traced.

    Raises:
        DeadlineExceeded: If nothing is left.
        InvalidRequest: If something is over its limit or contradicts another field.
    """
    _check_bounds(request, limits)
    _check_contradictions(request)
    _check_tools(request)
    options = request.atlas or AtlasOptions()
    bounds = _limits(options, default_alpha, limits, elapsed_s)
    fixed = None
    if options.deterministic:
        # What is left of the time when the body is there differs from one try to the next.
        fixed = Fixed(options.deadline_s or limits.default_deadline_s, options.policy_version)
    call = ChatCall(
        request_id=request_id,
        model=request.model,
        messages=_messages(request, limits),
        sampling=_sampling(request),
        limits=bounds,
        owner=owner,
        tools=tuple(
            tool.model_dump(mode="json", exclude_none=True) for tool in request.tools or ()
        ),
        tool_choice=(
            request.tool_choice.model_dump()
            if isinstance(request.tool_choice, NamedToolChoice)
            else request.tool_choice
        ),
        explain=request.atlas is not None and request.atlas.explain,
        events=request.atlas is not None and request.atlas.events,
        session=_session(owner, request.atlas),
        begin_effect=begin_effect,
        fixed=fixed,
        purse=purse,
        trace=trace,
    )
    return call if fixed is None else replace(call, sampling=_fixed_sampling(call))


def _session(owner: str, options: AtlasOptions | None) -> str:
    """A name for a key's session that no other key's session has; empty: there is none."""
    if options is None or options.session is None:
        return ""
    return hashlib.sha256(f"{owner}\n{options.session}".encode()).hexdigest()[:32]


def _check_bounds(request: ChatRequest, limits: LimitsConfig) -> None:
    options = request.atlas or AtlasOptions()
    for field, value, most in (
        ("messages", len(request.messages), limits.max_messages),
        ("tools", len(request.tools or ()), limits.max_tools),
        ("n", request.n, limits.max_n),
        ("max_tokens", request.max_tokens, limits.max_completion_tokens),
        ("max_completion_tokens", request.max_completion_tokens, limits.max_completion_tokens),
        ("atlas.deadline_s", options.deadline_s, limits.max_deadline_s),
        ("atlas.max_steps", options.max_steps, limits.max_steps),
    ):
        if value is not None and value > most:
            raise InvalidRequest(f"{field}: at most {most:g} here, got {value:g}", field)


def _check_contradictions(request: ChatRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options: only allowed with 'stream': true", "stream_options")
    if request.atlas is not None and request.atlas.events and not request.stream:
        raise InvalidRequest("atlas.events: only allowed with 'stream': true", "atlas.events")
    options = request.atlas or AtlasOptions()
    if options.policy_version is not None and not options.deterministic:
        raise InvalidRequest(
            "atlas.policy_version: only allowed with 'deterministic': true", "atlas.policy_version"
        )
    if options.deterministic and request.temperature:
        raise InvalidRequest(
            f"temperature: 0 with atlas.deterministic, got {request.temperature:g}", "temperature"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs: only allowed with 'logprobs': true", "top_logprobs")
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_tokens is {old} and max_completion_tokens {new}; send one of them", "max_tokens"
        )


def _check_tools(request: ChatRequest) -> None:
    names = [tool.function.name for tool in request.tools or ()]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools: two tools have the same name", "tools")
    choice = request.tool_choice
    if choice is not None and choice != "none" and not names:
        raise InvalidRequest("tool_choice: only allowed with tools", "tool_choice")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise InvalidRequest(
            f"tool_choice: no tool is named {choice.function.name!r}", "tool_choice"
        )
    schemas = SchemaBudget()
    for index, tool in enumerate(request.tools or ()):
        if tool.function.parameters is not None:
            schemas.check(
                tool.function.parameters, f"tools[{index}].function.parameters", is_object=True
            )
    chosen = request.response_format
    if isinstance(chosen, JsonSchemaResponseFormat):
        if chosen.json_schema.schema_ is None:
            field = "response_format.json_schema.schema"
            raise InvalidRequest(f"{field}: this field is required", field)
        schemas.check(chosen.json_schema.schema_, "response_format.json_schema.schema")


def _messages(request: ChatRequest, limits: LimitsConfig) -> tuple[dict[str, Any], ...]:
    """The messages as engines get them: text as one string, and roles every template knows."""
    chars, num_pictures, called = 0, 0, set[str]()
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(request.messages):
        content = _content(message.content, f"messages[{index}].content", limits)
        out: dict[str, Any] = {"role": message.role, "content": content}
        chars += len(text_of_content(content))
        num_pictures += len(pictures_of(content))
        if isinstance(message, InstructionMessage):
            out["role"] = "system"
        elif isinstance(message, AssistantMessage):
            if message.content is None and not message.tool_calls:
                field = f"messages[{index}].content"
                raise InvalidRequest(f"{field}: required unless there are tool_calls", field)
            if message.tool_calls:
                out["tool_calls"] = [call.model_dump() for call in message.tool_calls]
                called.update(call.id for call in message.tool_calls)
                chars += sum(len(call.function.arguments) for call in message.tool_calls)
        elif isinstance(message, ToolMessage):
            if message.tool_call_id not in called:
                field = f"messages[{index}].tool_call_id"
                raise InvalidRequest(f"{field}: answers no earlier tool call", field)
            out["tool_call_id"] = message.tool_call_id
        if not isinstance(message, ToolMessage) and message.name is not None:
            out["name"] = message.name
        messages.append(out)
    if chars > limits.max_prompt_chars:
        raise InvalidRequest(
            f"messages: at most {limits.max_prompt_chars} characters in all, got {chars}",
            "messages",
        )
    if num_pictures > limits.max_pictures:
        raise InvalidRequest(
            f"messages: at most {limits.max_pictures} pictures in all, got {num_pictures}",
            "messages",
        )
    return tuple(messages)


def _content(
    content: str | Sequence[TextPart | PicturePart] | None, field: str, limits: LimitsConfig
) -> Content:
    """Content as one string, or with its pictures as the parts that came."""
    if content is None or isinstance(content, str):
        return content
    texts = [part.text for part in content if isinstance(part, TextPart)]
    if len(texts) == len(content):
        return "\n".join(texts)
    for number, part in enumerate(content):
        if isinstance(part, PicturePart):
            check_picture(
                part.image_url.url,
                f"{field}[{number}].image_url.url",
                max_bytes=limits.max_picture_bytes,
                max_pixels=limits.max_picture_pixels,
            )
    return [part.model_dump(exclude_none=True) for part in content]


_SAMPLING = (
    "temperature",
    "top_p",
    "n",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "top_logprobs",
    "parallel_tool_calls",
)


def _sampling(request: ChatRequest) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        name: value for name in _SAMPLING if (value := getattr(request, name)) is not None
    }
    if (request.n or 1) > 1:
        # An engine that is greedy where nobody says otherwise refuses to answer more than once.
        sampling.setdefault("temperature", 1.0)
    max_tokens = request.max_completion_tokens or request.max_tokens
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if request.stop is not None:
        sampling["stop"] = request.stop if isinstance(request.stop, list) else [request.stop]
    if request.response_format is not None and request.response_format.type != "text":
        sampling["response_format"] = request.response_format.model_dump(
            by_alias=True, exclude_none=True
        )
    return sampling


def _fixed_sampling(call: ChatCall) -> dict[str, Any]:
    """Sampling without chance, and the same seed for the same body."""
    said = [call.model, call.messages, call.tools, call.tool_choice, call.sampling]
    text = json.dumps(said, sort_keys=True)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
    return {"seed": seed, **call.sampling, "temperature": 0.0}


def _limits(
    options: AtlasOptions, default_alpha: float, limits: LimitsConfig, elapsed_s: float
) -> Limits:
    deadline_s = limits.default_deadline_s if options.deadline_s is None else options.deadline_s
    if deadline_s <= elapsed_s:
        raise DeadlineExceeded(
            f"the request took {elapsed_s:.2f} s to arrive; its deadline is {deadline_s:g} s"
        )
    return Limits(
        alpha=default_alpha if options.alpha is None else options.alpha,
        deadline_s=deadline_s - elapsed_s,
        max_cost_usd=options.max_cost_usd,
        max_steps=options.max_steps or limits.max_steps,
        models=None if options.models is None else frozenset(options.models),
        tools=None if options.tools is None else frozenset(options.tools),
    )
