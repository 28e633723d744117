"""What do the shipped patterns reach on questions that one pair cannot answer, and at what cost?

How to run: `python -m benchmarks.patterns --out FILE.json [--figure PNG] [--url URL]
[--questions N]`. Without a URL it serves the nano pool itself. It asks composed questions
(`configs/nano/composed.jsonl`) and ordinary ones (`configs/nano/questions.jsonl`), all held out, of
every pattern, of every pair and of `atlas`, and scores the answers as a profile does. The engine's
own cost is measured in this process with models that answer at once.

Results to expect: see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.loop import ask_each, names_of_pairs
from benchmarks.patterns_figure import draw
from benchmarks.ports import free_port
from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target
from serve_app import environment
from serve_app.budget import Budget, Deadline
from serve_app.config import load_config
from serve_app.config.patterns.language import PatternConfig
from serve_app.models.clients import ModelClients
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.patterns.declared import PatternRunner
from serve_app.orchestrator.patterns.facts import names_in
from serve_app.orchestrator.trace import Trace
from serve_app.questions import Question, read_questions
from serve_app.schemas import ChatCall, Limits, Pair

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "nano.yaml"
SERVE = (sys.executable, "-m", "serve_app.cli.app", "serve")
_READY_TIMEOUT_S = 600.0
_RESAMPLES = 2000
_OWN_COST_RUNS = 400

console = Console(width=140)


@dataclass(slots=True)
class Row:
    """What one name reached on one set of questions."""

    name: str
    questions: str
    score: float
    low: float
    """With `high`: 95% interval over questions."""
    high: float
    usd_per_1000: float
    seconds: float
    """Mean of a request."""
    failed: int
    partial: int
    declined: int
    """Requests in which the pattern said that it has no answer."""
    scores: list[float] = field(default_factory=list)
    usd: list[float] = field(default_factory=list)


async def ask_all(url: str, name: str, set_name: str, questions: Sequence[Question]) -> Row:
    """Ask every question once, and sum up."""
    if name == PAIRS_ALONE:
        answers = await ask_each(url, "atlas", questions, {"not_models": [str(PLAN)]})
    else:
        answers = await ask_each(url, name, questions)
    scores = [value for value, _ in answers]
    seen = [extension for _, extension in answers if extension]
    low, high = interval(scores)
    return Row(
        name,
        set_name,
        float(np.mean(scores)),
        low,
        high,
        1000 * float(np.mean([e["cost_usd"] for e in seen] or [0.0])),
        float(np.mean([e["seconds"] for e in seen] or [0.0])),
        len(answers) - len(seen),
        sum(bool(e.get("partial")) for e in seen),
        sum(e.get("stop") == "declined" for e in seen),
        scores,
        [extension.get("cost_usd", 0.0) for _, extension in answers],
    )


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of a mean."""
    rng, array = np.random.default_rng(seed), np.asarray(values, np.float64)
    means = array[rng.integers(0, len(array), (_RESAMPLES, len(array)))].mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def difference(first: Row, second: Row) -> tuple[float, float]:
    """95% interval of the mean difference of two rows on the same questions."""
    return interval([a - b for a, b in zip(first.scores, second.scores, strict=True)])


def question_sets(count: int) -> dict[str, list[Question]]:
    """The held-out questions by what they ask for, at most `count` of each."""
    composed = list(read_questions(ROOT / "configs/nano/composed.jsonl"))
    simple = list(read_questions(ROOT / "configs/nano/questions.jsonl"))
    held = [q for q in (*composed, *simple) if q.effective_split != "train"]
    sets: dict[str, list[Question]] = {}
    for question in held:
        sets.setdefault(question.domain or "other", []).append(question)
    sets["look-ups"] = [question for question in sets["facts"] if _is_in_corpus(question)]
    found = {name: questions[:count] for name, questions in sets.items()}
    parts = [found["compound"][::2] + found["hops"][::2]]
    parts += [found[name][: len(parts[0])] for name in ("math", "facts", "code")]
    simple = [question for turn in zip(*parts[1:], strict=False) for question in turn]
    return found | {MIXTURE: parts[0] + simple[: 2 * len(parts[0])]}


@cache
def _corpus() -> tuple[str, ...]:
    lines = (ROOT / "configs/nano/corpus.jsonl").read_text().splitlines()
    return tuple(json.loads(line)["text"].casefold() for line in lines)


def _is_in_corpus(question: Question) -> bool:
    """Whether one sentence of the corpus has the answer, and every name of the question."""
    wanted = {str(question.gold).casefold(), *(n.casefold() for n in names_in(question.query))}
    return any(all(word in sentence for word in wanted) for sentence in _corpus())


PLAN = Pair.of_pattern("split-and-solve")
PAIRS_ALONE = "atlas without patterns"
MIXTURE = "mixture"
"""Two thirds simple questions, one third composed ones."""
PATTERNS = {
    "compound": ("split-and-solve",),
    "hops": ("split-and-solve",),
    "refusal": ("look-up-or-refuse",),
    "facts": ("cheap-first", "look-up-or-refuse"),
    "look-ups": ("look-up-or-refuse", "cheap-first"),
    "math": ("ask-three",),
    "repair": ("debug", "write-and-test"),
    MIXTURE: ("split-and-solve",),
}
"""Which patterns each set of questions is asked of, beside `atlas` and every pair."""
DEAR = "nano-facts@retrieval"


def judge(rows: dict[tuple[str, str], Row], own_ms: float) -> list[Target]:
    """What the issue asks for."""
    found: list[Target] = []

    def pooled(name: str, sets: Sequence[str]) -> Row:
        parts = [rows[name, of] for of in sets]
        scores = [value for part in parts for value in part.scores]
        usd = [value for part in parts for value in part.usd]
        low, high = interval(scores)
        mean = float(np.mean(scores))
        return Row(name, "+".join(sets), mean, low, high, 0.0, 0.0, 0, 0, 0, scores, usd)

    both = ("compound", "hops")
    pairs = {name for name, of in rows if "@" in name and of == "compound"}
    best = max((pooled(name, both) for name in sorted(pairs)), key=lambda row: row.score)
    found.append(Target(f"composed: best single pair ({best.name})", best.score, "<=", 0.15))
    refused = rows["pattern:look-up-or-refuse", "refusal"]
    found.append(Target("look-up-or-refuse: refused unanswerable", refused.score, ">=", 0.9))
    answerable = rows["pattern:look-up-or-refuse", "look-ups"]
    wrongly = answerable.declined / len(answerable.scores)
    found.append(Target("look-up-or-refuse: refused answerable", wrongly, "<=", 0.05))
    cheap, dear = rows["pattern:cheap-first", "facts"], rows[DEAR, "facts"]
    found.append(
        Target("cheap-first: dollars of its dear arm", sum(cheap.usd) / sum(dear.usd), "<=", 0.8)
    )
    found.append(
        Target("cheap-first: upper end of its gain", difference(cheap, dear)[1], ">=", 0.0)
    )
    plan = pooled(str(PLAN), both)
    found.append(Target("split-and-solve: composed, all parts right", plan.score, ">=", 0.6))
    tested, draft = rows["pattern:write-and-test", "repair"], rows["nano-code@none", "repair"]
    gain = difference(tested, draft)[0]
    found.append(Target("write-and-test: lower end of its gain over its draft", gain, ">=", 1e-9))
    routed, alone = rows["atlas", MIXTURE], rows[PAIRS_ALONE, MIXTURE]
    always = rows[str(PLAN), MIXTURE]
    gain, loss = difference(routed, alone)[0], difference(routed, always)[1]
    found.append(Target("mixture: lower end of the gain by patterns", gain, ">=", 1e-9))
    share = sum(routed.usd) / sum(always.usd)
    found.append(Target("mixture: dollars of always split-and-solve", share, "<=", 0.8))
    found.append(Target("mixture: upper end of the gain over always", loss, ">=", 0.0))
    simple = ("math", "facts", "code")
    change = difference(pooled("atlas", simple), pooled(PAIRS_ALONE, simple))[1]
    found.append(Target("simple: upper end of the gain by patterns", change, ">=", 0.0))
    found.append(Target("a pattern of one ask: ms more than its pair", own_ms, "<=", 0.5))
    return found


class InstantClients(ModelClients):
    """Models that answer at once, in this process."""

    async def complete(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> dict[str, Any]:
        """A short answer."""
        message = {"role": "assistant", "content": "36"}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        return {"choices": [{"index": 0, "message": message}], "usage": usage}

    async def stream(
        self, model_id: str, body: ChatBody, deadline: Deadline, session: str = ""
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Not asked for here."""
        raise NotImplementedError
        yield {}


async def own_cost_ms() -> float:
    """Median milliseconds that a pattern of one `ask` adds to the same pair."""
    node = {"ask": {"pair": "nano-math@none"}}
    pattern = PatternConfig.model_validate({"name": "one", "do": [node]})
    config = load_config(CONFIG).model_copy(update={"patterns": (pattern,)})
    pairs = PairRunner(config, InstantClients())
    nobody: Any = None  # nothing is routed
    runner = PatternRunner(pairs, nobody, config)
    call = ChatCall(
        "req_1", "x", ({"role": "user", "content": "What is 15% of 240?"},), {}, Limits(0.0, 30.0)
    )

    async def timed(pair: Pair, run: Callable[[PairWork], Any]) -> float:
        work = PairWork(pair, call, Budget(Deadline.after(30)), Trace("req_1").root)
        began_s = time.perf_counter()
        await run(work)
        return time.perf_counter() - began_s

    plain, composed = [], []
    for _ in range(_OWN_COST_RUNS):
        plain.append(await timed(Pair("nano-math", "none"), pairs.run))
        composed.append(await timed(Pair.of_pattern("one"), runner.run))
    return 1e3 * float(np.median(composed) - np.median(plain))


@contextmanager
def served(url: str | None, config: Path = CONFIG, data_dir: Path | None = None) -> Iterator[str]:
    """A URL of a pool: the one that is given, or that of a graph for the block.

    Args:
        url: Of a running graph; `None`: one is started.
        config: What is served.
        data_dir: Where it keeps what it learns; `None`: nowhere beyond the block.
    """
    if url is not None:
        yield url
        return
    port, haproxy = free_port(), environment.make_haproxy_folder()
    with tempfile.TemporaryDirectory() as folder:
        places = environment.haproxy_places(haproxy) | {
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "ATLAS_DATA_DIR": str(data_dir or f"{folder}/data"),
        }
        output = Path(folder) / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*SERVE, "--config", str(config), "--port", str(port)],
                cwd=ROOT,
                env={**os.environ, **places},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            ends_s = time.monotonic() + _READY_TIMEOUT_S
            while b"ready at" not in output.read_bytes():
                if process.poll() is not None or time.monotonic() > ends_s:
                    raise SystemExit(f"the graph did not start:\n{output.read_text()}")
                time.sleep(1.0)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def main() -> None:
    """Ask, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path, help="PNG file to write")
    parser.add_argument("--url", help="a running graph of the nano pool; none: one is started")
    parser.add_argument("--questions", type=int, default=60, help="at most, of each kind")
    args = parser.parse_args()
    own_ms = asyncio.run(own_cost_ms())
    sets = question_sets(args.questions)
    rows: dict[tuple[str, str], Row] = {}
    with served(args.url) as url:
        pairs = names_of_pairs(url)
        asked = [
            (name, of)
            for of in sets
            for name in (
                "atlas",
                PAIRS_ALONE,
                *(f"pattern:{pattern}" for pattern in PATTERNS.get(of, ())),
                *(pairs if of != MIXTURE else ()),
            )
        ]
        for name, of in track(asked, "questions", console=console):
            rows[name, of] = asyncio.run(ask_all(url, name, of, sets[of]))
    targets = judge(rows, own_ms)
    table = Table("asked", "questions", "score", "95%", "$ per 1000", "seconds", "failed")
    for row in rows.values():
        if "@" not in row.name or row.score == max(
            other.score for other in rows.values() if other.questions == row.questions
        ):
            table.add_row(
                row.name,
                row.questions,
                f"{row.score:.3f}",
                f"{row.low:.2f} to {row.high:.2f}",
                f"{row.usd_per_1000:.5f}",
                f"{row.seconds:.2f}",
                str(row.failed),
            )
    console.print(table)
    show_targets(targets)
    shown = [
        {name: value for name, value in asdict(row).items() if name not in ("scores", "usd")}
        for row in rows.values()
    ]
    record = {
        "machine": {
            name: value for name, value in machine().items() if name != "serve_environment"
        },
        "questions": {name: len(questions) for name, questions in sets.items()},
        "rows": shown,
        "targets": [target.as_json() for target in targets],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    if args.figure:
        draw(shown, args.figure)


if __name__ == "__main__":
    main()
