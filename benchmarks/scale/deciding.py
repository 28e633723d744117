"""What deciding costs: by candidates, outcomes, rules, utterances, and functions of a tool."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks.routing.decision import decision_ms, made_up
from benchmarks.rules import keyword_rules
from benchmarks.scale.growth import Growth, typical_ms
from rl.fit.fit import fit
from rl.fit.selection import FitSettings
from serve_app.budget import Deadline
from serve_app.config.rules import KeywordRuleConfig, SemanticRuleConfig
from serve_app.orchestrator.pairs.selection import FunctionSelector
from serve_app.router.rules.clusters import ClusterRule
from serve_app.router.rules.keyword import KeywordRule, Texts
from serve_app.router.rules.semantic import SemanticRule
from serve_app.tools.base import Function

CANDIDATES = (10, 100, 1_000, 10_000)
OUTCOMES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
RULES = (10, 100, 1_000, 10_000)
FUNCTIONS = (1, 10, 50, 200)
_DIM = 384
_TIMES = 200
_OFFERED = 8
"""Functions that a model is offered, of a tool that has more."""
_QUESTION = "please tell me which of the orders of last week were late and why, in two sentences"

Advance = Callable[[str], None]


def fitted_in_a_process(num_outcomes: int, num_pairs: int) -> dict[str, float]:
    """Fit and decide in a process of its own, so that its peak of memory is that of this alone.

    Returns:
        `fit_s`, `decision_ms`, `peak_gib` of the process, `rule_mib` that the rule holds.
    """
    command = [sys.executable, "-m", "benchmarks.scale.deciding", str(num_outcomes), str(num_pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measured(num_outcomes: int, num_pairs: int) -> dict[str, float]:
    """As `fitted_in_a_process`, in this process."""
    outcomes = made_up(num_outcomes, num_pairs, seed=0)
    settings = FitSettings(num_repeats=1)
    began_s = time.perf_counter()
    snapshot = fit(outcomes, settings)
    fit_s = time.perf_counter() - began_s
    before = psutil.Process().memory_info().rss
    rule = ClusterRule(snapshot)
    arrays = [getattr(snapshot, name) for name in vars(snapshot)]
    held = sum(of.nbytes for of in arrays if isinstance(of, np.ndarray))
    grown = psutil.Process().memory_info().rss - before
    return {
        "fit_s": fit_s,
        "decision_ms": decision_ms(rule, outcomes),
        "peak_gib": _peak_gib(),
        "rule_mib": (held + max(0, grown)) / 2**20,
    }


def _peak_gib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def by_candidates(advance: Advance, sizes: Sequence[int] = CANDIDATES) -> list[Growth]:
    """Decisions over ever more candidates, 100 outcomes each."""
    found = {}
    for size in sizes:
        advance(f"{size:,} candidates")
        found[size] = fitted_in_a_process(100 * size, size)
    return [
        _growth("decision over candidates", "ms", "decision_ms", found),
        _growth("memory of the rule over candidates", "MiB", "rule_mib", found),
    ]


def by_outcomes(advance: Advance, sizes: Sequence[int] = OUTCOMES) -> list[Growth]:
    """Fits on ever more outcomes of 20 candidates, and decisions after them."""
    found = {}
    for size in sizes:
        advance(f"{size:,} outcomes")
        found[size] = fitted_in_a_process(size, 20)
    return [
        _growth("decision over outcomes", "ms", "decision_ms", found),
        _growth("memory of the rule over outcomes", "MiB", "rule_mib", found),
        _growth("fit over outcomes", "s", "fit_s", found),
        _growth("peak memory of a fit over outcomes", "GiB", "peak_gib", found),
    ]


def _growth(name: str, unit: str, figure: str, found: dict[int, dict[str, float]]) -> Growth:
    return Growth(name, unit, {size: figures[figure] for size, figures in found.items()})


def by_rules(advance: Advance, sizes: Sequence[int] = RULES) -> list[Growth]:
    """Keyword rules in a row, the keywords of one, the utterances of a semantic rule."""
    rules, words, utterances = {}, {}, {}
    messages = [{"role": "user", "content": _QUESTION}]
    for size in sizes:
        advance(f"{size:,} rules, keywords and utterances")
        one = [KeywordRule(_keyword(f"word{number}")) for number in range(size)]
        rules[size] = typical_ms(partial(_followed, one, messages), 50)
        many = KeywordRule(KeywordRuleConfig.model_validate(keyword_rules(size)[0]))
        words[size] = typical_ms(partial(_followed, [many], messages), _TIMES)
        utterances[size] = _judged_ms(size)
    return [
        Growth("keyword rules", "ms", rules),
        Growth("keywords of a rule", "ms", words),
        Growth("utterances of a semantic rule", "ms", utterances),
    ]


def _keyword(word: str) -> KeywordRuleConfig:
    rule = {"type": "keyword", "name": word, "any": [word], "use": "route"}
    return KeywordRuleConfig.model_validate(rule)


def _followed(rules: Sequence[KeywordRule], messages: list[dict[str, Any]], _number: int) -> bool:
    texts = Texts(messages)
    return any(rule.matches(texts) for rule in rules)


def _judged_ms(num_utterances: int) -> float:
    routes = [
        {
            "name": f"route{route}",
            "use": "route",
            "utterances": [f"utterance {route} {n}" for n in range(num_utterances // 10)],
        }
        for route in range(10)
    ]
    config = {"type": "semantic", "name": "likeness", "routes": routes}
    vectors = _vectors(num_utterances)
    rule = SemanticRule(SemanticRuleConfig.model_validate(config), vectors)
    queries = _vectors(_TIMES)
    return typical_ms(lambda number: rule.judge(queries[number]), _TIMES)


def _vectors(count: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(count).standard_normal((count, _DIM)).astype(np.float32)
    vectors: NDArray[np.float32] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return vectors


def by_functions(advance: Advance, sizes: Sequence[int] = FUNCTIONS) -> list[Growth]:
    """Which functions of a tool are offered, with embeddings that are there at once."""
    return [Growth("functions of a tool", "ms", asyncio.run(_offered_ms(advance, sizes)))]


async def _offered_ms(advance: Advance, sizes: Sequence[int]) -> dict[int, float]:
    async def embed(texts: list[str], deadline: Deadline) -> NDArray[np.float32]:
        return _vectors(len(texts))

    took, query = {}, _vectors(1)[0]
    for size in sizes:
        advance(f"{size} functions")
        functions = tuple(
            Function(f"get_thing_{number}", f"Gets thing number {number} of the shop.", {})
            for number in range(size)
        )
        selector, seconds = FunctionSelector(embed), []
        for _ in range(_TIMES):
            began_s = time.perf_counter()
            await selector.select("shop", functions, _OFFERED, _QUESTION, Deadline.after(10), query)
            seconds.append(time.perf_counter() - began_s)
        took[size] = float(np.median(seconds)) * 1e3
    return took


def main() -> None:
    """Fit and decide for the process that asked."""
    sys.stdout.write(json.dumps(measured(*map(int, sys.argv[1:3]))) + "\n")


if __name__ == "__main__":
    main()
