"""What is left of a long conversation when it is made to fit: are questions on it still answered?

How to run: `python -m benchmarks.context --out FILE.json [--questions N]`. A fact is told in turn 3
of 60 and asked for at the end, in conversations of 2, 4 and 8 times the model's context. The parts
that serve make the conversation fit and run the pair (`PairRunner`), with the bundled encoder; the
model is nano-facts on vLLM in this process, without Ray. For comparison the model gets the fact's
turn and the question alone ("without history"), and the newest turns that fit.

nano-facts finds nothing that stands more than 200 tokens before the question, so `context.fill` has
conversations fill 28% of the window of 680 tokens.

Results to expect: see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.nano.evaluate import load_engine
from benchmarks.nano.facts_tasks import FactsGenerator
from benchmarks.nano.gazetteer import passage, with_sources
from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target
from serve_app.budget import Budget, Deadline
from serve_app.config import AtlasConfig, EmbedderConfig
from serve_app.content import Message
from serve_app.embedder.encoder import TextEncoder
from serve_app.errors import ContextTooLong
from serve_app.models.clients import ModelClients
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.trace import SpanKind, Trace
from serve_app.schemas import ChatCall, Limits, Pair
from serve_app.tools.runner import ToolRunner

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "configs" / "nano" / "weights" / "nano-facts"
WINDOW = 680
FILL = 0.28
MULTIPLES = (2, 4, 8)
NUM_TURNS = 60
FACT_TURN = 3
_SENTENCES = {2: 0, 4: 1, 8: 4}
"""By multiple: sentences that an other turn shows; the more, the longer it is."""
_FITTING_RUNS = 2000

console = Console(width=140)


class Engine(Protocol):
    """A model that answers a conversation."""

    def answer(self, messages: Sequence[Message], max_tokens: int) -> tuple[str, int]:
        """Its text, and the tokens of its prompt."""
        ...


class VllmEngine:
    """nano-facts on vLLM."""

    def __init__(self) -> None:
        """Load the weights."""
        self._engine = load_engine(WEIGHTS)

    def answer(self, messages: Sequence[Message], max_tokens: int) -> tuple[str, int]:
        """Its text, and the tokens of its prompt."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        chat: Any = list(messages)
        (output,) = self._engine.chat([chat], sampling, use_tqdm=False)
        return output.outputs[0].text, len(output.prompt_token_ids or ())


class Client(ModelClients):
    """Hands requests to an engine in this process."""

    def __init__(self, engine: Engine) -> None:
        """Know no failure."""
        super().__init__()
        self._engine = engine

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> dict[str, Any]:
        """One whole completion."""
        text, tokens = self._engine.answer(body["messages"], body["max_tokens"])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1}
        return {"choices": [choice], "usage": usage}


@dataclass(frozen=True)
class Asked:
    """A conversation, and the right answer to its last question."""

    fact: list[Message]
    """The turn that tells the fact."""
    conversation: list[Message]
    question: Message
    gold: str


@dataclass(frozen=True)
class Row:
    """Answers to conversations of one length."""

    name: str
    questions: int
    right: float
    """Share of the answers."""
    prompt_tokens: float
    """For each answer, as the engine counts."""
    conversation_tokens: float
    """Of each whole conversation, as the gateway counts; 0 where it fits."""
    p50_ms: float
    """Of making it fit and of the answer."""


def conversations(multiple: int, count: int, seed: int) -> list[Asked]:
    """Conversations whose third turn shows two sentences, of which the second one is asked for."""
    rng, facts = random.Random(seed), FactsGenerator()

    def other() -> list[Message]:
        size = _SENTENCES[multiple]
        if not size:
            asked = facts.closed_book_question(rng, "seen")
            return _turn(asked.query, asked.gold)
        entries = passage(rng, size, "seen", reserved=False)
        question = entries[0].relation.question(rng, entries[0].subject, "seen")
        return _turn(with_sources(question, [e.sentence for e in entries]), entries[0].value)

    made = []
    for _ in range(count):
        first, second = passage(rng, 2, "seen", reserved=False)
        question = first.relation.question(rng, first.subject, "seen")
        fact = _turn(with_sources(question, [first.sentence, second.sentence]), first.value)
        before = [m for _ in range(FACT_TURN - 1) for m in other()]
        after = [m for _ in range(NUM_TURNS - FACT_TURN - 1) for m in other()]
        last = second.relation.question(rng, second.subject, "seen")
        asked = {"role": "user", "content": last}
        made.append(Asked(fact, [*before, *fact, *after], asked, second.value))
    return made


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Bench:
    """The real runner of pairs, in front of an engine in this process."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        """Load the encoder."""
        encoder = TextEncoder(EmbedderConfig(), folder)

        async def embed(texts: list[str], deadline: Deadline) -> NDArray[np.float32]:
            return await asyncio.to_thread(encoder.encode, texts)

        model = {
            "type": "local",
            "model_id": "nano-facts",
            "model_source": str(WEIGHTS),
            "max_completion_tokens": 24,
            "capabilities": {"context_tokens": WINDOW},
        }
        context = {"fill": FILL}
        config = AtlasConfig.model_validate({"models": [model], "context": context})
        self.pairs = PairRunner(config, Client(engine), ToolRunner([]), embed)

    async def ask(self, messages: Sequence[Message]) -> tuple[str, Trace]:
        """The answer to a conversation, and what happened."""
        limits, trace = Limits(alpha=0.0, deadline_s=600), Trace("bench")
        call = ChatCall("bench", "nano-facts", tuple(messages), {}, limits)
        budget = Budget(Deadline.after(600))
        work = PairWork(Pair("nano-facts", "none"), call, budget, trace.root)
        choices = await self.pairs.run(work)
        return (text_of(choices) or "").strip(), trace

    async def row(self, name: str, asked: Sequence[tuple[Sequence[Message], str]]) -> Row:
        """Ask every question."""
        right, tokens, whole, seconds = 0, 0, 0, []
        for messages, gold in asked:
            began_s = time.perf_counter()
            answer, trace = await self.ask(messages)
            seconds.append(time.perf_counter() - began_s)
            right += answer == gold
            tokens += trace.root.usage.prompt_tokens
            spans = [s for s in trace.root.walk() if s.kind is SpanKind.CONTEXT]
            whole += sum(int(span.attributes["prompt_tokens"]) for span in spans)
        count = len(asked)
        p50_ms = float(np.median(seconds)) * 1e3
        return Row(name, count, right / count, tokens / count, whole / count, p50_ms)

    async def added_us(self) -> float:
        """Median microseconds that the look at a conversation of 60 turns takes that fits."""
        messages = [m for _ in range(NUM_TURNS) for m in _turn("How are you?", "Well.")]
        body: ChatBody = {"messages": messages, "max_tokens": 24}
        fitter, took = self.pairs.parts.models._context, []
        call = ChatCall("bench", "nano-facts", (), {}, Limits(alpha=0.0, deadline_s=600))
        budget, root = Budget(Deadline.after(600)), Trace("bench").root
        work = PairWork(Pair("nano-facts", "none"), call, budget, root)
        for _ in range(_FITTING_RUNS):
            began_s = time.perf_counter()
            fitted = await fitter.fitted(work, body, 1e5)
            took.append(time.perf_counter() - began_s)
            if fitted is not body:
                raise AssertionError("it fits, and was changed")
        return float(np.median(took)) * 1e6


def newest(messages: Sequence[Message], question: Message) -> list[Message]:
    """The newest turns that take no more than what the runner keeps, roughly, and the question."""
    kept, left = [question], int(WINDOW * FILL * 2.5)  # characters: nano's tokens hold that many
    for begin in range(len(messages) - 2, -1, -2):
        turn = list(messages[begin : begin + 2])
        left -= sum(len(message["content"]) for message in turn)
        if left < 0:
            break
        kept = turn + kept
    return kept


async def run(engine: Engine, count: int) -> tuple[list[Row], list[Target]]:
    """All rows, and what they are held against."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(engine, Path(folder))
        rows, targets = [], []
        await bench.ask(conversations(8, 1, seed=1)[0].conversation[:8])  # warm
        for multiple in track(MULTIPLES, "lengths", console=console):
            asked = conversations(multiple, count, seed=multiple)
            alone = await bench.row(
                f"{multiple}x: without history", [([*a.fact, a.question], a.gold) for a in asked]
            )
            fitted = await bench.row(
                f"{multiple}x: made to fit",
                [([*a.conversation, a.question], a.gold) for a in asked],
            )
            last = await bench.row(
                f"{multiple}x: the newest turns",
                [(newest(a.conversation, a.question), a.gold) for a in asked],
            )
            rows += [alone, fitted, last]
            share = fitted.right / max(alone.right, 1e-9)
            targets.append(Target(f"{multiple}x: right, of without history", share, ">=", 0.8))
            length = fitted.conversation_tokens / WINDOW
            targets.append(Target(f"{multiple}x: length, in windows", length, ">=", multiple))
        try:
            await bench.ask([{"role": "user", "content": "Who? " * WINDOW}])
            refused = 0.0
        except ContextTooLong:
            refused = 1.0
        targets.append(Target("a question that cannot fit is refused", refused, ">=", 1.0))
        targets.append(Target("us for 60 turns that fit", await bench.added_us(), "<=", 200.0))
    return rows, targets


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the results")
    parser.add_argument("--questions", type=int, default=100, help="for each length")
    args = parser.parse_args()
    rows, targets = asyncio.run(run(VllmEngine(), args.questions))
    table = Table("conversation", "questions", "right", "prompt tokens", "of", "p50 ms")
    for row in rows:
        table.add_row(
            row.name,
            str(row.questions),
            f"{row.right:.3f}",
            f"{row.prompt_tokens:.0f}",
            f"{row.conversation_tokens:.0f}" if row.conversation_tokens else "",
            f"{row.p50_ms:.0f}",
        )
    console.print(table)
    show_targets(targets)
    about = {name: value for name, value in machine().items() if name != "serve_environment"}
    record = {
        "machine": about,
        "window": WINDOW,
        "fill": FILL,
        "turns": NUM_TURNS,
        "fact_turn": FACT_TURN,
        "rows": [asdict(row) for row in rows],
        "targets": [target.as_json() for target in targets],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
