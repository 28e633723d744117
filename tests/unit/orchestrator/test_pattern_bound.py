"""Random patterns in front of engines that say more or less, fail, hang or refuse: no run passes
its worst case, and every run ends in an answer, a refusal or an error of ours.

The engines report the most that they may: each byte of the prompt as a token, and every token that
they were allowed to write.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.budget import Use
from serve_app.config.patterns.bound import Bound, bound_of, question_bytes, typical_usd
from serve_app.config.patterns.check import check_patterns
from serve_app.config.patterns.language import PatternConfig
from serve_app.errors import (
    AtlasError,
    BudgetExceeded,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    ReplicaDied,
    ToolFailed,
    ToolRetry,
    ToolTimeout,
    ToolWorkerDied,
)
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.patterns.declared import Composed
from serve_app.schemas import Pair, StopReason
from serve_app.tools.base import ToolResult
from tests.pattern_fakes import PatternBench, pattern_config
from tests.toolset_fakes import CALCULATOR, DESK, NOTES, ToolsetBench

QUESTION = 'Where is Ada? "Quoted"\n\x00 f(1) == 2'
MESSAGES = ({"role": "user", "content": QUESTION},)
OUTPUT = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}

Node = dict[str, Any]

# --- patterns -----------------------------------------------------------------------------------

PAIRS = st.sampled_from(["small", "large", "lead", "route", "small@calculator", "pattern:inner"])


def asks(*words: str) -> st.SearchStrategy[Node]:
    """An `ask` whose prompt has references to some of these words."""
    prompts = st.lists(st.sampled_from(["question", *words]), min_size=1, max_size=3)
    return st.builds(
        _ask,
        PAIRS,
        st.none() | prompts,
        st.sampled_from([1, 16, 400]),
        st.sampled_from([16, 300, 4096]),
        st.booleans(),
    )


def _ask(pair: str, words: list[str] | None, max_tokens: int, max_bytes: int, fits: bool) -> Node:
    fields: Node = {"pair": pair, "max_tokens": max_tokens, "max_bytes": max_bytes}
    if words is not None:
        fields["prompt"] = "Say " + " and ".join(f"{{{{{word}}}}}" for word in words)
    if fits:
        fields["output"] = OUTPUT
    return {"ask": fields}


def checks(of: str) -> st.SearchStrategy[Node]:
    """A `verify` of every kind but `grounded`, which is like `citations`."""
    kinds: list[Node] = [
        {"check": "length", "max_chars": 20},
        {"check": "pattern", "pattern": "[a-z]+"},
        {"check": "schema", "output": OUTPUT},
        {"check": "citations"},
        {"check": "examples", "tool": "debug"},
        {"check": "verifier", "verifier": "judge"},
    ]
    ends = st.sampled_from(["refuse", "fail", "keep"])
    return st.builds(
        lambda kind, end: {"verify": {"of": of, "else": end, **kind}}, st.sampled_from(kinds), ends
    )


def accepts() -> st.SearchStrategy[Node]:
    """When a cascade is content."""
    return st.sampled_from(
        [
            {"min_logprob": -0.1},
            {"agrees": True},
            {"verifier": "judge"},
            {"pattern": "[0-9]+"},
            {"examples": "debug"},
        ]
    )


def cascades(of: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    """Cascades of such rungs."""
    return st.builds(
        lambda rungs, accept: {"cascade": {"of": rungs, "accept": accept}},
        st.lists(of, min_size=2, max_size=3),
        accepts(),
    )


def nodes(depth: int, *words: str) -> st.SearchStrategy[Node]:
    """A node of any kind, with at most so many inside one another."""
    here = asks(*words)
    leaves: list[st.SearchStrategy[Node]] = [
        here,
        st.just({"tool": {"tool": "calculator", "arguments": {"expression": "{{question}}"}}}),
        st.just({"retrieve": {"corpus": "handbook", "has_names": True}}),
        st.just({"refuse": {"when": {"question": {"empty": True}}}}),
    ]
    if depth == 1:
        return st.one_of(leaves)
    inner = nodes(depth - 1, *words)
    join = asks(*words, "answers")
    wholes: list[st.SearchStrategy[Node]] = [
        st.builds(
            lambda way, other: {
                "branch": {"cases": [{"when": {"question": {"gt": 1}}, "do": [way]}], "else": other}
            },
            inner,
            st.lists(inner, min_size=1, max_size=2),
        ),
        st.builds(
            lambda do, how: {"parallel": {"do": do, "join": how}},
            st.lists(inner, min_size=1, max_size=3),
            st.sampled_from(["concat", "first"]) | join,
        ),
        st.builds(
            lambda do: {"parallel": {"do": [do], "each": ["x", "yy"]}}, nodes(1, *words, "item")
        ),
        st.builds(lambda of: {"vote": {"of": of}}, st.lists(here, min_size=2, max_size=4)),
        cascades(here),
        st.builds(
            lambda draft, critics, revise: {
                "critique": {"draft": draft, "critics": critics, "revise": revise}
            },
            here,
            st.lists(checks("draft") | asks(*words, "draft"), min_size=1, max_size=2),
            asks(*words, "draft", "objections") | cascades(asks(*words, "draft", "objections")),
        ),
        st.builds(
            lambda lead, worker, join: {
                "plan": {"lead": lead, "worker": worker, "join": join, "max_subtasks": 3}
            },
            here,
            asks(*words, "subtask"),
            st.just("leaves") | join,
        ),
    ]
    return st.one_of([*leaves, *wholes])


@st.composite
def patterns(draw: st.DrawFn) -> Node:
    """A pattern of up to three nodes, of which later ones see the earlier ones."""
    do: list[Node] = []
    words: list[str] = []
    for number in range(draw(st.integers(1, 3))):
        choices = nodes(2, *words)
        if words:
            choices |= checks(words[-1])
        node = draw(choices)
        (fields,) = node.values()
        name = f"n{number}"
        do.append({next(iter(node)): {**fields, "id": name}})
        words.append(name)
    limits = draw(
        st.sampled_from(
            [{}, {"model_calls": 2}, {"tokens": 2000}, {"usd": 0.01}, {"tool_calls": 1}]
        )
    )
    return {"name": "outer", "routable": False, "limits": limits, "do": do}


INNER: Node = {
    "name": "inner",
    "do": [
        {"retrieve": {"id": "found", "corpus": "handbook"}},
        {"ask": {"pair": "small", "uses": ["found"], "cite": "found", "max_tokens": 32}},
    ],
}

# --- engines ------------------------------------------------------------------------------------

WORDS = (
    "",
    "5",
    "OK",
    "long " * 300,
    '"' * 900 + "\n\\" * 300,
    "\x01" * 500,
    "ü😀" * 200,
    "{{question}} {{n0}} {{",
    '{"kind": "a"}',
    '```json\n{"kind": "' + "k" * 3000 + '"}\n```',
    '{"subtasks": [{"id": "a", "ask": "one"}, {"id": "b", "ask": "of {{a}} twice {{a}}"}]}',
    '{"subtasks": [{"id": "a", "ask": "' + "w" * 3000 + '"}, {"id": "c", "ask": "one"}]}',
)
FAILURES = (
    EngineError("broken"),
    EngineUnavailable("down"),
    EngineBusy("busy"),
    ReplicaDied("died"),
    InvalidRequest("refused"),
    RuntimeError("unforeseen"),
)


class Script:
    """Engines and tools that do as chance says, and count what they were used for."""

    def __init__(self, seed: int, *, fails: bool) -> None:
        self.chance = random.Random(seed)
        self.fails = fails
        self.model_calls = 0
        self.tokens = 0
        self.tool_calls = 0

    def says(self, body: Mapping[str, Any]) -> Any:
        """A completion, a failure, or either after a while."""
        self.model_calls += 1
        if body.get("logprobs") and self.chance.random() < 0.3:
            return InvalidRequest("no logprobs here")
        if self.fails and self.chance.random() < 0.25:
            return self.chance.choice(FAILURES)
        whole = self.completion(body)
        return self.later(whole) if self.chance.random() < 0.3 else whole

    async def later(self, completion: dict[str, Any]) -> dict[str, Any]:
        hangs = self.fails and self.chance.random() < 0.1
        await asyncio.sleep(30 if hangs else self.chance.choice([0, 0.002]))
        return completion

    def completion(self, body: Mapping[str, Any]) -> dict[str, Any]:
        prompt = json.dumps([body["messages"], body.get("tools", [])], ensure_ascii=False)
        used = len(prompt.encode())
        written = body["max_tokens"]
        message: dict[str, Any] = {"role": "assistant", "content": self.chance.choice(WORDS)}
        if body.get("tools") and self.chance.random() < 0.6:
            call = {"name": "calculator", "arguments": '{"expression": "1+1"}'}
            message["tool_calls"] = [
                {"id": f"c{number}", "type": "function", "function": call}
                for number in range(self.chance.choice([1, 1, 3, 12]))
            ]
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": "a", "logprob": -0.2}]}
        self.tokens += used + written
        usage = {"prompt_tokens": used, "completion_tokens": written}
        return {"choices": [choice], "usage": usage | {"total_tokens": used + written}}

    def judges(self, body: Mapping[str, Any]) -> Any:
        said = self.says(body)
        if isinstance(said, dict):
            said["choices"][0]["message"] = {
                "role": "assistant", "content": self.chance.choice(["0.1", "0.9", "?"])
            }  # fmt: skip
        return said

    def tool(self, cost_usd: float) -> Any:
        self.tool_calls += 1
        failures = [ToolRetry("wrong"), ToolFailed("broken"), ToolTimeout("late")]
        failures.append(ToolWorkerDied("died"))
        if self.fails and self.chance.random() < 0.25:
            return self.chance.choice(failures)
        found = [{"id": "s", "title": "", "text": "Ada is in Rome. " * 9, "similarity": 0.5}]
        return ToolResult("\x02" * 8192, {"sources": found}, cost_usd=cost_usd)


def bench_of(folder: Path, written: Node, script: Script) -> PatternBench:
    """A deployment of a pattern before these engines; a pattern that cannot be is put aside."""
    bench = PatternBench(folder)
    read = [PatternConfig.model_validate(of) for of in (written, INNER)]
    config = bench.config.model_copy(update={"patterns": tuple(read)})
    check_patterns(config)
    bench.config = config
    bench.runner.use(config)
    bench.engines.says = dict.fromkeys(("small", "large", "lead"), script.says)
    bench.engines.says["judge"] = script.judges
    bench.tools.says = {
        tool.tool_id: lambda _, price=tool.price_usd_per_call: script.tool(price)
        for tool in config.tools
    }
    bench.chooser.order[Pair("small", "calculator")] = 0.5
    return bench


def ran(written: Node, seed: int, *, fails: bool, seconds: float) -> tuple[Any, Bound, Use, Script]:
    """How a run ended, its worst case, what it used, and what the engines saw."""

    async def run() -> tuple[Any, Bound, Use, Script]:
        script = Script(seed, fails=fails)
        with tempfile.TemporaryDirectory() as folder:
            bench = bench_of(Path(folder), written, script)
            bound = bound_of(bench.config.patterns[0], bench.config, question_bytes(MESSAGES))
            ended: Any
            try:
                ended = await bench.run(QUESTION, seconds=seconds, messages=MESSAGES)
            except AtlasError as failure:
                ended = failure
            return ended, bound, bench.budget.spent, script

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are made again at once."""
    monkeypatch.setattr("serve_app.orchestrator.pairs.paid.pause_s", lambda *_: 0.0)


FEW = settings(
    max_examples=50,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@FEW
@given(written=patterns(), seed=st.integers(0, 1 << 30))
def test_no_run_passes_its_worst_case_and_every_run_ends(written: Node, seed: int) -> None:
    ended, bound, spent, script = ran(written, seed, fails=True, seconds=0.7)
    assert script.model_calls <= bound.model_calls
    assert spent.model_calls <= bound.model_calls
    assert script.tool_calls <= bound.tool_calls
    assert script.tokens <= bound.tokens
    assert spent.tokens <= bound.tokens
    assert spent.usd <= bound.usd * (1 + 1e-9)
    if isinstance(ended, Composed):
        assert text_of(ended.choices) is not None
        assert ended.is_partial == (ended.stop not in (StopReason.ANSWERED, StopReason.DECLINED))
    else:
        assert isinstance(ended, AtlasError)


@FEW
@given(written=patterns(), seed=st.integers(0, 1 << 30))
def test_a_run_without_limits_is_never_cut_short_by_its_own_worst_case(
    written: Node, seed: int
) -> None:
    ended, *_ = ran(written | {"limits": {}}, seed, fails=False, seconds=60.0)
    assert not isinstance(ended, BudgetExceeded), ended
    if isinstance(ended, Composed):
        assert ended.stop in (StopReason.ANSWERED, StopReason.DECLINED, StopReason.FAILED)


# --- figures ------------------------------------------------------------------------------------


def bound(folder: Path, do: str, limits: str = "{}") -> Bound:
    """The worst case of a pattern, for a question of 100 bytes."""
    inner = "{name: inner, do: [{ask: {pair: small, max_tokens: 10}}]}"
    config = pattern_config(folder, f"{{name: a, limits: {limits}, do: [{do}]}}", inner)
    return bound_of(config.patterns[0], config, 100)


SMALL = "{ask: {pair: small, max_tokens: 10}}"
DEATHS = 2


@pytest.mark.parametrize(
    ("do", "model_calls", "tool_calls"),
    [
        (SMALL, 1, 0),
        ("{ask: {pair: route}}", 2 * 10, 2 * 16),  # a pair that calls its tool takes the most
        ("{ask: {pair: small, output: {properties: {}}}}", 2, 0),
        ("{ask: {pair: 'pattern:inner'}}", 1 + DEATHS, 0),
        ("{tool: {tool: calculator}}", 0, 2),
        (f"{{vote: {{of: [{SMALL}, {SMALL}, {SMALL}]}}}}", 3, 0),
        (f"{{cascade: {{of: [{SMALL}, {SMALL}], accept: {{agrees: true}}}}}}", 2, 0),
        (f"{{cascade: {{of: [{SMALL}, {SMALL}], accept: {{min_logprob: -1}}}}}}", 4, 0),
        (f"{{cascade: {{of: [{SMALL}, {SMALL}], accept: {{verifier: judge}}}}}}", 3, 0),
        (f"{{cascade: {{of: [{SMALL}, {SMALL}], accept: {{examples: debug}}}}}}", 2, 2),
        (f"{{parallel: {{do: [{SMALL}], each: [a, b, c]}}}}", 3, 0),
        (f"{{plan: {{lead: {SMALL}, worker: {SMALL}, max_subtasks: 4}}}}", 2 + 4, 0),
        (f"{{plan: {{lead: {SMALL}, worker: {SMALL}, max_subtasks: 4, join: {SMALL}}}}}", 7, 0),
    ],
)
def test_the_worst_case_counts_calls(
    tmp_path: Path, do: str, model_calls: int, tool_calls: int
) -> None:
    found = bound(tmp_path, do)
    if "route" in do:
        assert found.model_calls > 4
        assert found.tool_calls > 4
    else:
        assert (found.model_calls, found.tool_calls) == (model_calls + DEATHS, tool_calls)


def test_of_two_ways_the_dearer_counts(tmp_path: Path) -> None:
    large = "{ask: {pair: large, max_tokens: 10}}"
    branch = "{branch: {cases: [{when: {question: {eq: a}}, do: [%s]}], else: [%s]}}"
    assert bound(tmp_path, branch % (SMALL, large)) == bound(tmp_path, large)


def test_a_patterns_own_limits_are_its_worst_case(tmp_path: Path) -> None:
    limits = "{model_calls: 1, tool_calls: 0, tokens: 9, usd: 0.0001, seconds: 3}"
    assert bound(tmp_path, SMALL, limits) == Bound(1, 0, 9, 0.0001, 3)


def test_a_model_may_take_all_the_time_there_is(tmp_path: Path) -> None:
    assert bound(tmp_path, SMALL).seconds == math.inf
    assert bound(tmp_path, "{ask: {pair: small, seconds: 4}}, {ask: {seconds: 3}}").seconds == 7


def test_side_by_side_the_slowest_counts(tmp_path: Path) -> None:
    first, second = "{ask: {seconds: 4}}", "{ask: {seconds: 3}}"
    assert bound(tmp_path, f"{{parallel: {{do: [{first}, {second}]}}}}").seconds == 4


def test_a_toolset_may_cost_what_its_dearest_member_does(tmp_path: Path) -> None:
    tools = (CALCULATOR | {"price_usd_per_call": 1.0}, NOTES, DESK)
    config = ToolsetBench(tmp_path, tools=tools, max_calls_per_reply=2, max_tool_rounds=3).config
    asks = {"ask": {"pair": "m@desk", "max_tokens": 10}}
    pattern = PatternConfig.model_validate({"name": "a", "do": [asks]})
    found = bound_of(pattern, config.model_copy(update={"patterns": (pattern,)}), 100)
    calls = 2 * 3 * 2  # each may be made again
    assert found.tool_calls == calls
    assert found.usd == calls * 2.0


def test_a_longer_question_costs_more(tmp_path: Path) -> None:
    config = pattern_config(tmp_path, f"{{name: a, do: [{SMALL}]}}")
    short, long = (bound_of(config.patterns[0], config, size) for size in (100, 200))
    assert long.tokens > short.tokens
    assert long.usd > short.usd


def test_a_typical_run_costs_its_usual_calls(tmp_path: Path) -> None:
    priced = {Pair("small", "none"): 1.0, Pair("large", "none"): 10.0}
    large = "{ask: {pair: large}}"
    config = pattern_config(
        tmp_path,
        f"{{name: a, do: [{{cascade: {{of: [{SMALL}, {large}], accept: {{agrees: true}}}}}}]}}",
        f"{{name: b, do: [{{plan: {{lead: {large}, worker: {SMALL}}}}}, {large}]}}",
        "{name: c, do: [{ask: {pair: 'pattern:a'}}, {tool: {tool: calculator}}]}",
    )
    usd = [typical_usd(of, config, priced) for of in config.patterns]
    assert usd == pytest.approx([1.0, 22.0, 1.0 + 1e-4])
