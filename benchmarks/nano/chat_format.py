"""How a conversation becomes the exact text a nano model reads.

`render` is the training side of `chat_template.jinja` (the serving side): the two must agree byte
for byte, which the trainer asserts before its first step. Pure Python: no torch or vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.nano.task import TOOL_PARAMETERS

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
PAD = "<|endoftext|>"
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<tools>",
    "</tools>",
)
"""Single tokens that stay visible in decoded text, so that vLLM's Hermes parser sees them."""

GENERATION_PROMPT = f"{IM_START}assistant\n"


@dataclass(frozen=True)
class Segment:
    """A stretch of rendered text; `is_target` marks what the model itself has to write."""

    text: str
    is_target: bool


def tool_schemas(tool_ids: Sequence[str]) -> list[dict[str, Any]]:
    """OpenAI `tools` entries for tools named in `TOOL_PARAMETERS`."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool_id,
                "parameters": {
                    "type": "object",
                    "properties": {name: {"type": "string"} for name in TOOL_PARAMETERS[tool_id]},
                    "required": list(TOOL_PARAMETERS[tool_id]),
                },
            },
        }
        for tool_id in tool_ids
    ]


def tool_call(name: str, **arguments: str) -> dict[str, Any]:
    """An assistant message that calls one tool."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def _call_text(call: Mapping[str, Any]) -> str:
    function = call["function"]
    name = json.dumps(function["name"], ensure_ascii=False)
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def render(messages: Sequence[Mapping[str, Any]], tool_ids: Sequence[str] = ()) -> list[Segment]:
    """The conversation as text segments; joined, they equal what the chat template renders.

    Args:
        messages: OpenAI chat messages with string content.
        tool_ids: Tools offered, out of `TOOL_PARAMETERS`.
    """
    offered = "; ".join(f"{tool_id}({', '.join(TOOL_PARAMETERS[tool_id])})" for tool_id in tool_ids)
    tools = f"<tools>{offered}</tools>" if offered else ""
    segments: list[Segment] = []
    for index, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if index == 0 and tools:
            head = content if role == "system" else ""
            gap = "\n" if head else ""
            segments.append(Segment(f"{IM_START}system\n{head}{gap}{tools}{IM_END}\n", False))
            if role == "system":
                continue
        if role == "assistant":
            calls = "\n".join(_call_text(call) for call in message.get("tool_calls") or ())
            gap = "\n" if content and calls else ""
            segments.append(Segment(GENERATION_PROMPT, False))
            segments.append(Segment(f"{content}{gap}{calls}{IM_END}", True))
            segments.append(Segment("\n", False))
        elif role == "tool":
            response = f"<tool_response>\n{content}\n</tool_response>"
            segments.append(Segment(f"{IM_START}tool\n{response}{IM_END}\n", False))
        else:
            segments.append(Segment(f"{IM_START}{role}\n{content}{IM_END}\n", False))
    return segments
