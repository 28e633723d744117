"""How right are the shipped rules, what do they decide, and what do they add to a request?

How to run: `python -m benchmarks.rules --out FILE.json`. It takes a minute, the shipped encoder and
nothing else: rules that ask a model are left out. The texts are held out: nothing was fitted on
them. What rules add is measured in the gateway's own code, with an encoder that answers at once.

Results to expect: see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target
from rl.fit.rules import Encode, LabelledText, RulesReport, evaluate_rules, read_labelled
from serve_app.budget import Deadline
from serve_app.config import AtlasConfig, load_config
from serve_app.config.patterns.check import members_of_patterns
from serve_app.config.rules import SemanticRuleConfig, utterances_hash
from serve_app.embedder.encoder import TextEncoder
from serve_app.models.clients import ModelClients
from serve_app.orchestrator.decision_client import Decider
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.rules import RuleFollower
from serve_app.orchestrator.run import Run
from serve_app.questions import read_questions
from serve_app.schemas import ChatCall, Fixed, Limits, MemberState, ModelMember, PoolState

ROOT = Path(__file__).parent.parent
NANO = ROOT / "configs" / "nano.yaml"
DESK = ROOT / "configs" / "customer-support.yaml"
KEYWORD_MS = 0.1
SEMANTIC_MS = 0.3
_RUNS = 500
_UTTERANCES = 500
_DIM = 384

console = Console(width=120)


@dataclass(frozen=True, slots=True)
class Added:
    """What following some rules takes; milliseconds of a request."""

    rules: str
    p50_ms: float
    p99_ms: float


class _InstantDecider(Decider):
    """Embeds at once."""

    def __init__(self, dim: int) -> None:
        self._random = np.random.default_rng(0)
        self._dim = dim

    async def embed(self, texts: list[str], deadline: Deadline) -> NDArray[np.float32]:
        drawn = self._random.normal(size=(len(texts), self._dim))
        vectors: NDArray[np.float32] = drawn.astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    embed_lasting = embed

    async def embed_query(
        self, query: str, deadline: Deadline, fixed: Fixed | None = None
    ) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = (await self.embed([query], deadline))[0]
        return vector


def keyword_rules(count: int) -> list[dict[str, Any]]:
    """A rule of so many keywords that none of the texts has, and a default."""
    words = [f"keyword{number:05d}" for number in range(count)]
    rule = {"type": "keyword", "name": "words", "any": words, "use": "route"}
    return [rule, {"type": "default", "use": "pattern:what-i-can-do"}]


def semantic_rules(encoder: str) -> list[dict[str, Any]]:
    """A rule of 500 utterances and 10 routes, and a default."""
    routes = [
        {
            "name": f"route{route}",
            "use": "route",
            "utterances": [f"utterance {route} {n}" for n in range(_UTTERANCES // 10)],
        }
        for route in range(10)
    ]
    rule: dict[str, Any] = {"type": "semantic", "name": "likeness", "routes": routes}
    weights = {"bias": -5.0, "similarity": 5.0, "margin": 5.0, "neighbours": 5.0}
    rule["fitted"] = {
        "encoder": encoder,
        "utterances": utterances_hash(SemanticRuleConfig.model_validate(rule)),
        "examples": 1,
        "routes": {route["name"]: weights for route in routes},
    }
    return [rule, {"type": "default", "use": "pattern:what-i-can-do"}]


async def added_ms(config: AtlasConfig, name: str, rules: list[Any], text: str) -> Added:
    """What rules add to a request with this text, embedding left out."""
    kept = {of: getattr(config, of) for of in AtlasConfig.model_fields}
    config = AtlasConfig.model_validate(kept | {"rules": rules})
    pairs = PairRunner(config, ModelClients(lambda model_id: None))
    follower = RuleFollower(pairs, _InstantDecider(_DIM), config)
    await follower.start()
    follower.use(
        PoolState(
            pool_version=1,
            models=tuple(ModelMember(m.model_id, MemberState.READY) for m in config.models),
            tools=tuple(tool.tool_id for tool in config.tools),
            pairs=config.all_pairs(),
            patterns=members_of_patterns(config),
            config=config,
        ),
        config,
    )
    took = []
    for number in range(_RUNS + 20):
        call = ChatCall(
            request_id=f"req_{number}",
            model="atlas",
            messages=({"role": "user", "content": f"{number} {text}"},),
            sampling={},
            limits=Limits(alpha=0.1, deadline_s=60),
        )
        run = Run(call)
        began_s = time.perf_counter()
        ruled = await follower.decide(run, call.limits)
        took.append((time.perf_counter() - began_s) * 1e3)
        assert ruled.hops
    return Added(name, *(float(np.percentile(took[20:], share)) for share in (50, 99)))


async def measure_added(config: AtlasConfig) -> list[Added]:
    """What each kind of rule adds."""
    short = "What is the capital of France, and how many people live there?"
    long = "the quick brown fox jumps over the lazy dog " * 90
    found = []
    for count in (100, 10_000):
        rules = keyword_rules(count)
        found.append(await added_ms(config, f"{count} keywords, 64 characters", rules, short))
        found.append(await added_ms(config, f"{count} keywords, 4,000 characters", rules, long))
    rules = semantic_rules(config.embedder.model)
    found.append(await added_ms(config, f"{_UTTERANCES} utterances, 10 routes", rules, short))
    return found


def report_json(result: RulesReport) -> dict[str, Any]:
    """A report as the results hold it."""
    return {
        "accuracy": result.accuracy,
        "rules": [
            {
                "rule": tally.name,
                "kind": tally.kind,
                "saw": tally.num_texts,
                "coverage": tally.coverage,
                "accuracy": tally.accuracy,
                "alone": {"coverage": alone.coverage, "accuracy": alone.accuracy},
            }
            for tally, alone in zip(result.in_order, result.alone, strict=True)
        ],
        "confusion": {f"{of} -> {got}": count for (of, got), count in result.confusion.items()},
    }


def show_report(title: str, result: RulesReport) -> None:
    """Print a report."""
    table = Table("rule", "saw", "decided", "right", "alone: decided", "right", title=title)
    for tally, alone in zip(result.in_order, result.alone, strict=True):
        table.add_row(
            f"{tally.name} ({tally.kind})",
            str(tally.num_texts),
            *(f"{share:.1%}" for share in (tally.coverage, tally.accuracy or 0.0)),
            *(f"{share:.1%}" for share in (alone.coverage, alone.accuracy or 0.0)),
        )
    table.add_row("together", "", "", f"{result.accuracy:.1%}", "", "")
    console.print(table)


def remembering(encode: Encode) -> Encode:
    """An encoder that embeds each text once."""
    known: dict[str, NDArray[np.float32]] = {}

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, encode(new), strict=True))
        return np.stack([known[text] for text in texts])

    return embed


def share_refused(config: AtlasConfig, texts: Sequence[str], encode: Encode) -> float:
    """Share of some texts that the rules send to the default."""
    labelled = [
        LabelledText(text, "outside", ({"role": "user", "content": text},)) for text in texts
    ]
    return evaluate_rules(config.rules, labelled, encode).accuracy


def scope_table(config: AtlasConfig, encode: Encode) -> dict[str, dict[str, Any]]:
    """What the bundled pool refuses, by kind of text."""
    lines = (ROOT / "configs/nano/scope/outside-held-out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kinds.setdefault(f"outside, {row['kind']}", []).append(row["text"])
    kinds["outside, all"] = [row["text"] for row in rows]
    for name in ("questions", "composed"):
        for question in read_questions(ROOT / f"configs/nano/{name}.jsonl"):
            kinds.setdefault(f"{name}, {question.split}", []).append(question.query)
            kinds.setdefault("in scope, all", []).append(question.query)
            if question.split == "held_out":
                kinds.setdefault("in scope, wordings held out", []).append(question.query)
    return {
        kind: {"texts": len(texts), "refused": share_refused(config, texts, encode)}
        for kind, texts in kinds.items()
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    nano, desk = load_config(NANO), load_config(DESK)
    added = asyncio.run(measure_added(nano))
    with tempfile.TemporaryDirectory() as cache:
        encode = remembering(TextEncoder(nano.embedder, Path(cache)).encode)
        support = evaluate_rules(
            desk.rules, read_labelled(ROOT / "configs/customer-support/test.jsonl"), encode
        )
        scope = scope_table(nano, encode)
    table = Table("rules", "p50 ms", "p99 ms", title="added to a request, embedding left out")
    for of in added:
        table.add_row(of.rules, f"{of.p50_ms:.3f}", f"{of.p99_ms:.3f}")
    console.print(table)
    show_report("customer service desk, 80 messages held out", support)
    table = Table("texts", "number", "refused", title="the bundled pool's default")
    for kind, row in scope.items():
        table.add_row(kind, str(row["texts"]), f"{row['refused']:.1%}")
    console.print(table)
    best = max(alone.coverage * (alone.accuracy or 0.0) for alone in support.alone)
    targets = [
        *(
            Target(
                f"p50 ms added, {of.rules}",
                round(of.p50_ms, 4),
                "<=",
                SEMANTIC_MS if "utterances" in of.rules else KEYWORD_MS,
            )
            for of in added
        ),
        Target("outside texts refused", scope["outside, all"]["refused"], ">=", 0.9),
        Target("questions in scope refused", scope["in scope, all"]["refused"], "<=", 0.03),
        Target(
            "the same, wordings held out",
            scope["in scope, wordings held out"]["refused"],
            "<=",
            0.03,
        ),
        Target("messages to the right desk, together", support.accuracy, ">=", best),
    ]
    show_targets(targets)
    record = {
        "machine": {
            name: value for name, value in machine().items() if name != "serve_environment"
        },
        "added": [{"rules": of.rules, "p50_ms": of.p50_ms, "p99_ms": of.p99_ms} for of in added],
        "customer_support": report_json(support),
        "scope": scope,
        "targets": [target.as_json() for target in targets],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
