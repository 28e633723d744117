"""Measures a nano model through vLLM's offline engine: greedy, with tools really run.

To plug a generator in: `<name>_tasks.EVAL_CELLS` lists the cells. By default a cell asks
`GENERATOR.questions(rng, cell.split, ...)` of the kinds in `cell.kinds`, offers `cell.tools`,
parses a call with vLLM's own Hermes parser, runs it, returns the result as a `tool` turn and scores
the final answer. A module with other prompts (sources in the text, a scripted result) defines
`evaluation_items(cell, rng, n) -> list[EvalItem] | None`, where `None` means the default;
`EvalItem.run_tool` then answers the calls.
"""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.nano.chat_format import tool_schemas
from benchmarks.nano.labelled import labelled
from benchmarks.nano.registry import load_cells, load_generator, task_module, weights_dir
from benchmarks.nano.skills import SKILL_CELLS, TOOL_CELLS, skill_cells, skill_items
from benchmarks.nano.task import TOOL_PARAMETERS, EvalCell, Question
from serve_app.errors import ToolRetry
from serve_app.scoring import GivenAnswer, measure
from serve_app.tools.builtin.calculator import evaluate

if TYPE_CHECKING:
    from vllm import LLM

logger = logging.getLogger(__name__)

ToolFunction = Callable[[str, Mapping[str, Any]], str]
"""Takes a tool id and its arguments, returns the text of the result."""

_CODE_SECONDS = 5
_CODE_BYTES = 1 << 30
_LIMITED_RUN = f"""import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_CODE_SECONDS}, {_CODE_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({_CODE_BYTES}, {_CODE_BYTES}))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
exec(compile(sys.argv[1], "<code>", "exec"), {{"__name__": "__main__"}})
"""
"""Sets its own limits: a `preexec_fn` would make every start fork the engine's large process."""


@dataclass(frozen=True)
class EvalItem:
    """One prompt of a cell."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[str, ...]
    question: Question
    run_tool: ToolFunction | None = None
    """Answers the model's call; `None` = the calculator or Python."""
    judges_result: bool = False
    """Whether the tool's result is what is scored, rather than what the model makes of it."""


@dataclass(frozen=True)
class ItemResult:
    """What became of one prompt."""

    item: EvalItem
    answer: str
    """The final text, after the tool's result where there was a call."""
    call: Mapping[str, Any] | None
    """The parsed call (`name`, `arguments`); `None` where there was none, or no valid one."""
    is_right: bool


@dataclass(frozen=True)
class CellResult:
    """One row of the table; shares are in [0, 1]."""

    cell: str
    model_id: str
    split: str
    tools: tuple[str, ...]
    num_items: int
    accuracy: float
    valid_call_rate: float
    """Share of prompts answered with a well-formed call of an offered tool."""
    required: float | None
    required_call: float | None
    accuracy_by_kind: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the required shares were reached; true where nothing is required."""
        return self.accuracy >= (self.required or 0) and self.valid_call_rate >= (
            self.required_call or 0
        )


def is_right(question: Question, answer: str) -> bool:
    """Whether a final answer is right, by the question's metric."""
    return measure(labelled(question, "evaluated"), GivenAnswer(answer)) == 1.0


def run_python(code: str) -> tuple[int, str]:
    """Exit status and output of code in a limited interpreter of its own.

    For code written by the models trained here, on trusted prompts; serving uses the sandbox.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LIMITED_RUN, code],
            capture_output=True,
            text=True,
            timeout=2 * _CODE_SECONDS,
            env={},
            check=False,
        )
    except (subprocess.TimeoutExpired, ValueError):
        return 1, "timeout"
    return done.returncode, (done.stdout or done.stderr[-500:]).strip()


def run_builtin_tool(tool_id: str, arguments: Mapping[str, Any]) -> str:
    """Run the calculator or Python; an error comes back as text, as it does in serving."""
    if tool_id == "calculator":
        try:
            return evaluate(str(arguments["expression"]))
        except ToolRetry as error:
            return f"error: {error}"
    if tool_id == "python":
        return run_python(str(arguments["code"]))[1]
    raise ValueError(f"no built-in tool {tool_id!r}; give the item a run_tool")


def cell_items(name: str, cell: EvalCell, seed: int, n: int) -> list[EvalItem]:
    """The prompts of a cell, the same for the same seed."""
    rng = random.Random(f"{seed}-{name}-{cell.name}")
    if cell in SKILL_CELLS or cell in TOOL_CELLS:
        return skill_items(cell, rng, n)
    custom = getattr(task_module(name), "evaluation_items", None)
    if custom is not None:
        items: list[EvalItem] | None = custom(cell, rng, n)
        if items is not None:
            return items
    generator = load_generator(name)
    questions: list[Question] = []
    while len(questions) < n:
        drawn = generator.questions(rng, cell.split, n)
        wanted = [q for q in drawn if not cell.kinds or q.kind in cell.kinds]
        if not wanted:
            raise ValueError(f"cell {cell.name!r}: no question of kinds {cell.kinds!r}")
        questions += wanted
    return [EvalItem(({"role": "user", "content": q.query},), cell.tools, q) for q in questions[:n]]


def load_engine(model_dir: Path, seed: int = 0) -> LLM:
    """A vLLM engine on the CPU.

    It computes in float32, which is faster than bfloat16 on CPUs without instructions for it.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    return LLM(
        str(model_dir),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        seed=seed,
        disable_log_stats=True,
    )


def evaluate_items(
    engine: LLM, items: Sequence[EvalItem], max_tokens: int = 256
) -> list[ItemResult]:
    """Answer all prompts greedily, with at most one tool round each."""
    texts = _generate(engine, [list(item.messages) for item in items], items, max_tokens)
    calls = [
        parse_call(engine, text, item.tools) if item.tools else None
        for text, item in zip(texts, items, strict=True)
    ]
    answers = list(texts)
    called = [index for index, call in enumerate(calls) if call is not None]
    follow_ups, results = [], []
    for index in called:
        call, item = calls[index], items[index]
        assert call is not None
        result = (item.run_tool or run_builtin_tool)(call["name"], call["arguments"])
        results.append(result)
        turn = {"role": "assistant", "content": "", "tool_calls": [_wire_call(call)]}
        answer_turn = {"role": "tool", "tool_call_id": "call-0", "content": result}
        follow_ups.append([*item.messages, turn, answer_turn])
    second = _generate(engine, follow_ups, [items[i] for i in called], max_tokens)
    for index, text, result in zip(called, second, results, strict=True):
        answers[index] = result if items[index].judges_result else text
    return [
        ItemResult(item, answer, call, is_right(item.question, answer))
        for item, answer, call in zip(items, answers, calls, strict=True)
    ]


def _wire_call(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": "call-0", "type": "function", "function": function}


def _generate(
    engine: LLM, chats: list[list[dict[str, Any]]], items: Sequence[EvalItem], max_tokens: int
) -> list[str]:
    """One greedy completion per chat, in order; chats with the same tools go in one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, skip_special_tokens=True)
    texts = [""] * len(chats)
    for tools in {item.tools for item in items}:
        indices = [i for i, item in enumerate(items) if item.tools == tools]
        outputs = engine.chat(
            [chats[i] for i in indices],
            sampling,
            tools=tool_schemas(tools) or None,
            use_tqdm=False,
        )
        for index, output in zip(indices, outputs, strict=True):
            texts[index] = output.outputs[0].text
    return texts


def parse_call(engine: LLM, text: str, tools: Sequence[str]) -> dict[str, Any] | None:
    """The only tool call in a text by vLLM's Hermes parser; `None` unless it fits a tool."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    request = ChatCompletionRequest(messages=[{"role": "user", "content": "."}])
    parsed = Hermes2ProToolParser(engine.get_tokenizer()).extract_tool_calls(text, request)
    if not parsed.tools_called or len(parsed.tool_calls) != 1:
        return None
    function = parsed.tool_calls[0].function
    try:
        arguments = json.loads(function.arguments)
    except json.JSONDecodeError:
        return None
    if function.name not in tools or not isinstance(arguments, dict):
        return None
    if set(arguments) != set(TOOL_PARAMETERS[function.name]):
        return None
    return {"name": function.name, "arguments": arguments}


def summarize(model_id: str, cell: EvalCell, results: Sequence[ItemResult]) -> CellResult:
    """One table row from the results of a cell."""
    by_kind: dict[str, list[bool]] = {}
    for result in results:
        by_kind.setdefault(result.item.question.kind, []).append(result.is_right)
    return CellResult(
        cell=cell.name,
        model_id=model_id,
        split=cell.split,
        tools=cell.tools,
        num_items=len(results),
        accuracy=sum(r.is_right for r in results) / len(results),
        valid_call_rate=sum(r.call is not None for r in results) / len(results),
        required=cell.required,
        required_call=cell.required_call,
        accuracy_by_kind={kind: sum(v) / len(v) for kind, v in sorted(by_kind.items())},
    )


def evaluate_model(
    name: str,
    model_dir: Path | None = None,
    *,
    n: int = 300,
    seed: int = 1,
    skills: bool = False,
) -> tuple[list[CellResult], list[dict[str, Any]]]:
    """Evaluate one nano model on all its cells.

    Args:
        name: Short name, for example `math`.
        model_dir: Folder of the weights; `None` = the shipped ones.
        n: Prompts per cell.
        seed: Seed of the questions.
        skills: Whether to measure its skills too.

    Returns:
        The rows of the table, and every wrong answer for reading.
    """
    engine = load_engine(model_dir or weights_dir(name))
    rows: list[CellResult] = []
    wrong: list[dict[str, Any]] = []
    for cell in (*load_cells(name), *(skill_cells(name) if skills else ())):
        results = evaluate_items(engine, cell_items(name, cell, seed, n))
        rows.append(summarize(f"nano-{name}", cell, results))
        logger.info("%s %s: %.3f", name, cell.name, rows[-1].accuracy)
        wrong += [
            {
                "cell": cell.name,
                "kind": r.item.question.kind,
                "prompt": r.item.messages[-1]["content"],
                "gold": r.item.question.gold,
                "call": r.call,
                "answer": r.answer,
            }
            for r in results
            if not r.is_right
        ]
    return rows, wrong


def show(rows: Sequence[CellResult], console: Console) -> None:
    """Print the table."""
    table = Table(title="nano models, greedy, through vLLM")
    for column in ("model", "cell", "split", "tools"):
        table.add_column(column)
    for column in ("n", "right", "valid call", "required"):
        table.add_column(column, justify="right")
    for row in rows:
        required = "" if row.required is None else f"{100 * row.required:.0f}%"
        colour = "" if row.required is None else ("[green]" if row.passed else "[red]")
        valid = f"{100 * row.valid_call_rate:.1f}%" if row.tools else ""
        table.add_row(
            row.model_id,
            row.cell,
            row.split,
            ", ".join(row.tools) or "-",
            str(row.num_items),
            f"{colour}{100 * row.accuracy:.1f}%",
            valid,
            required,
        )
    console.print(table)


def save(rows: Sequence[CellResult], path: Path, *, seed: int) -> None:
    """Write the table as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [asdict(row) for row in rows]
    document = {"seed": seed, "decoding": "greedy", "engine": "vllm", "cells": cells}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
