"""Does the pattern `debug` mend more code than its model alone, and does it tell errors apart?

How to run: `python -m benchmarks.debugging --out FILE.json [--weights DIR] [--questions N]`. The
pattern runs on the real engine with the real sandbox and the shipped corpus of bugs; the model is
nano-code, greedy, in this process by transformers. Every request is in a wording, and about a
function, of which training mended none. Scored by unit tests.

Results to expect: see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.nano.code_faults import ERROR_TYPES
from benchmarks.nano.code_repair import draw_repair, examined
from benchmarks.nano.registry import weights_dir
from benchmarks.patterns import CONFIG, interval
from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target
from serve_app.budget import Budget, Deadline
from serve_app.config import AtlasConfig, load_config
from serve_app.config.patterns.language import PatternLimits
from serve_app.models.clients import ModelClients
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.patterns.declared import PatternRunner
from serve_app.orchestrator.trace import Trace
from serve_app.questions import Question
from serve_app.schemas import ChatCall, Limits, Pair
from serve_app.scoring import GivenAnswer, measure
from serve_app.tools.base import ToolResult
from serve_app.tools.registry import build_tool
from serve_app.tools.reports import ErrorType, code_in, error_said, trials_in
from serve_app.tools.runner import ToolRunner

PATTERN = Pair.of_pattern("debug")
PLAIN = Pair("nano-code", "none")
_BATCH = 48
_SECONDS = 600.0
_WAYS: dict[Any, ErrorType] = {0: "syntax", 1: "runtime", "else": "logic"}
"""The ways of the pattern's branch."""

console = Console(width=120)


class NanoClients(ModelClients):
    """nano-code in this process: calls that wait together are answered in one batch."""

    def __init__(self, weights: Path) -> None:
        """Load the model.

        Args:
            weights: Its folder.
        """
        import torch
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

        super().__init__()
        torch.set_num_threads(1)
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(weights, padding_side="left")
        # `generate` is typed for a protocol that the model's own class does not fit.
        self._model: Any = LlamaForCausalLM.from_pretrained(weights, dtype=torch.float32)
        self._waiting: list[tuple[ChatBody, asyncio.Future[tuple[str, int, int]]]] = []
        self._answering: asyncio.Task[None] | None = None

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> dict[str, Any]:
        """Its answer."""
        future: asyncio.Future[tuple[str, int, int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((body, future))
        if self._answering is None:
            self._answering = asyncio.create_task(self._answer_all())
        text, read, written = await future
        usage = {"prompt_tokens": read, "completion_tokens": written}
        message = {"role": "assistant", "content": text}
        return {
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": usage | {"total_tokens": read + written},
        }

    async def stream(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Not asked for here."""
        raise NotImplementedError
        yield {}

    async def _answer_all(self) -> None:
        while self._waiting:
            await asyncio.sleep(0.2)  # for others to join the batch
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            answers = await asyncio.to_thread(self._generated, [body for body, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        self._answering = None

    def _generated(self, bodies: Sequence[ChatBody]) -> list[tuple[str, int, int]]:
        import torch

        chats = [
            self._tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True
            )
            for body in bodies
        ]
        read = self._tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            written = self._model.generate(
                input_ids=read["input_ids"],
                attention_mask=read["attention_mask"],
                max_new_tokens=256,
                do_sample=False,
            )[:, read["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        sizes = read["attention_mask"].sum(dim=1).tolist()
        pad = self._tokenizer.pad_token_id
        return [
            (text, int(size), int((row != pad).sum()))
            for text, size, row in zip(texts, sizes, written, strict=True)
        ]


class NearTools(ToolRunner):
    """The real tools, in this process."""

    def __init__(self, config: AtlasConfig) -> None:
        """Make those that the pattern uses.

        Args:
            config: The deployment.
        """
        super().__init__(config.tools)
        self._near = {
            tool.tool_id: build_tool(tool)
            for tool in config.tools
            if tool.tool_id in ("debug", "bugs")
        }

    async def run(
        self, tool_id: str, arguments: Any, *, deadline_s: float, function: str | None = None
    ) -> ToolResult:
        """Call it in a thread."""
        tool = self._near[tool_id]
        return await asyncio.to_thread(tool.run, arguments, tool.config.timeout_s)


@dataclass(frozen=True)
class Asked:
    """One request, and what became of it."""

    error: ErrorType
    told: dict[str, ErrorType]
    """What each hop takes it for."""
    plain: float
    """1: the model alone has mended it."""
    mended: float
    """1: the pattern has."""
    rounds: int
    """Calls of the model in the pattern."""


class Bench:
    """The pattern and its model, side by side."""

    def __init__(self, weights: Path) -> None:
        """Load everything.

        Args:
            weights: Folder of nano-code's weights.
        """
        config = load_config(CONFIG)
        roomy = PatternLimits(seconds=_SECONDS)
        patterns = tuple(p.model_copy(update={"limits": roomy}) for p in config.patterns)
        self._config = config.model_copy(update={"patterns": patterns})
        self._tools = NearTools(self._config)
        self._pairs = PairRunner(self._config, NanoClients(weights), self._tools)
        nobody: Any = None  # nothing is routed
        self._patterns = PatternRunner(self._pairs, nobody, self._config)

    async def ask(self, number: int, error: ErrorType, rng: random.Random) -> Asked:
        """Ask both one request that training has not seen."""
        repair = draw_repair(rng, "held_out", error)
        query = repair.worded(rng, "held_out")
        question = Question.model_validate(
            {
                "id": f"debugging-{number:04d}",
                "query": query,
                "metric": {"name": "unit_tests", "tests": list(repair.tests)},
                "gold": repair.answer,
            }
        )
        call = ChatCall(
            f"req_{number}",
            "x",
            ({"role": "user", "content": query},),
            {"temperature": 0.0},
            Limits(0.0, _SECONDS),
        )
        trace, alone = Trace("req_1"), Trace("req_2")
        budget = Budget(Deadline.after(_SECONDS))
        composed, choices = await asyncio.gather(
            self._patterns.run(PairWork(PATTERN, call, budget, trace.root)),
            self._pairs.run(PairWork(PLAIN, call, Budget(Deadline.after(_SECONDS)), alone.root)),
        )
        spans = list(trace.root.walk())
        (way,) = [span.attributes["way"] for span in spans if span.name == "branch mended"]
        scores = [
            await asyncio.to_thread(measure, question, GivenAnswer(text_of(of) or ""))
            for of in (composed.choices, choices)
        ]
        return Asked(
            error,
            {**told_by_hops(query), "together": _WAYS[way]},
            scores[1],
            scores[0],
            sum(span.name == str(PLAIN) for span in spans),
        )


def told_by_hops(query: str) -> dict[str, ErrorType]:
    """What single hops take a request for; what a hop cannot tell counts as logic."""
    code = code_in(query)
    ran = examined(code, trials_in(query, code))["kind"]
    return {
        "words": error_said(query) or "logic",
        "compile": "syntax" if ran == "syntax" else "logic",
        "run": "logic" if ran in ("logic", "none") else "runtime",
    }


def difference(asked: Sequence[Asked]) -> tuple[float, float]:
    """95% interval of what the pattern adds to its model."""
    return interval([of.mended - of.plain for of in asked])


def judge(asked: Sequence[Asked]) -> list[Target]:
    """What the issue asks for."""
    right = {
        hop: float(np.mean([of.told[hop] == of.error for of in asked])) for hop in asked[0].told
    }
    together = right.pop("together")
    return [
        Target("triage: all hops together", together, ">=", 0.95),
        Target("triage: more than the best single hop", together - max(right.values()), ">=", 0.0),
        Target("mended by the pattern", float(np.mean([of.mended for of in asked])), ">=", 0.8),
        Target("lower end of what it adds to nano-code@none", difference(asked)[0], ">=", 0.15),
    ]


def main() -> None:
    """Ask, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=weights_dir("code"))
    parser.add_argument("--questions", type=int, default=100, help="of each error")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    asked = asyncio.run(ask_all(Bench(args.weights), args.questions, args.seed))
    table = Table("error", "questions", "triage", "nano-code@none", "pattern", "adds", "calls")
    rows = []
    for error in (*ERROR_TYPES, "all"):
        of = [one for one in asked if error in (one.error, "all")]
        low, high = difference(of)
        row = {
            "error": error,
            "questions": len(of),
            "triage": float(np.mean([one.told["together"] == one.error for one in of])),
            "plain": float(np.mean([one.plain for one in of])),
            "mended": float(np.mean([one.mended for one in of])),
            "adds_low": low,
            "adds_high": high,
            "calls": float(np.mean([one.rounds for one in of])),
            "hops": {
                hop: float(np.mean([one.told[hop] == one.error for one in of]))
                for hop in of[0].told
            },
        }
        rows.append(row)
        shares = [f"{row[name]:.3f}" for name in ("triage", "plain", "mended")]
        adds = f"{low:.2f} to {high:.2f}"
        table.add_row(error, str(len(of)), *shares, adds, f"{row['calls']:.2f}")
    console.print(table)
    targets = judge(asked)
    show_targets(targets)
    kept = {name: value for name, value in machine().items() if name != "serve_environment"}
    record = {"machine": kept, "rows": rows, "targets": [target.as_json() for target in targets]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


async def ask_all(bench: Bench, count: int, seed: int) -> list[Asked]:
    """Ask so many requests of each error, some at a time."""
    rng, asked = random.Random(seed), list[Asked]()
    wanted = [error for _ in range(count) for error in ERROR_TYPES]
    for first in range(0, len(wanted), _BATCH):
        batch = enumerate(wanted[first : first + _BATCH], start=first)
        works = [bench.ask(n, error, random.Random(rng.random())) for n, error in batch]
        asked += await asyncio.gather(*works)
    return asked


if __name__ == "__main__":
    main()
