"""Every kind of node: what it does, how it fails, and what is left when a cap cuts it short."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.budget import Caps
from serve_app.errors import (
    AtlasError,
    BudgetExceeded,
    DeadlineExceeded,
    EngineBusy,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    NoCandidate,
    ServiceError,
    ToolFailed,
    ToolRetry,
    ToolTimeout,
)
from serve_app.models.reply import Choice
from serve_app.orchestrator.answer import text_of
from serve_app.orchestrator.patterns.declared import Composed
from serve_app.orchestrator.patterns.nodes.plan import read_plan
from serve_app.orchestrator.patterns.nodes.vote import log_odds
from serve_app.schemas import DecidedBy, Pair, StopReason
from serve_app.tools.base import ToolResult
from tests.pattern_fakes import PatternBench

Body = dict[str, Any]


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., PatternBench]:
    """Makes a deployment of patterns; models are told as keywords what to say."""

    def make(*texts: str, **says: Any) -> PatternBench:
        return PatternBench(tmp_path, *texts, says=says)

    return make


Make = Callable[..., PatternBench]


def do(*nodes: str, extra: str = "") -> str:
    """A pattern of nodes."""
    return f"{{name: a, do: [{', '.join(nodes)}]{extra}}}"


def ask(pair: str, prompt: str | None = None, **fields: Any) -> str:
    """An `ask` of a pair, as YAML."""
    given = {"pair": pair} | ({} if prompt is None else {"prompt": prompt}) | fields
    return json.dumps({"ask": given})


def never(_: Body) -> Awaitable[str]:
    """An engine that does not answer in time."""

    async def hang() -> str:
        await asyncio.Event().wait()
        return "late"

    return hang()


def echo(body: Body) -> str:
    """An engine that says its question in brackets."""
    return f"<{body['messages'][-1]['content']}>"


def said(composed: Composed) -> str:
    """The text of an answer."""
    return text_of(composed.choices) or ""


def partial(composed: Composed) -> tuple[str, StopReason]:
    """The text of a partial answer, and why it is none more than that."""
    assert composed.is_partial
    assert composed.choices[0].finish_reason == "length"
    return said(composed), composed.stop


def streamed(bench: PatternBench) -> str:
    """The text that went to the caller piece by piece."""
    return "".join(piece.text or "" for piece in bench.pieces)


# --- chains -------------------------------------------------------------------------------------


async def test_a_chain_answers_with_its_last_node(bench: Make) -> None:
    text = do(ask("small", id="x"), ask("large", "{{x}}!"))
    assert await bench(text, small="5", large=echo).ask() == "<5!>"


async def test_a_chain_answers_with_the_node_that_is_named(bench: Make) -> None:
    text = do(ask("small", id="x"), ask("large"), extra=", answer: x")
    assert await bench(text, small="5", large="6").ask() == "5"


async def test_a_node_that_fails_ends_its_chain(bench: Make) -> None:
    deployment = bench(do(ask("small"), ask("large")), small=EngineError("broken"))
    with pytest.raises(EngineError, match="broken"):
        await deployment.run()
    assert deployment.engines.asked("large") == []


async def test_what_there_is_at_a_cap_is_a_partial_answer(bench: Make) -> None:
    text = do(ask("small", id="x"), ask("large", "{{x}}"))
    composed = await bench(text, small="draft").run(caps=Caps(model_calls=1))
    assert partial(composed) == ("draft", StopReason.MODEL_CALLS)


async def test_a_cap_before_there_is_anything_is_its_own_error(bench: Make) -> None:
    with pytest.raises(AtlasError, match="calls of models"):
        await bench(do(ask("small"))).run(caps=Caps(model_calls=0))


async def test_the_limits_of_a_pattern_hold_though_the_caller_has_none(bench: Make) -> None:
    text = do(ask("small", id="x"), ask("large", "{{x}}"), extra=", limits: {model_calls: 1}")
    assert partial(await bench(text, small="draft").run()) == ("draft", StopReason.MODEL_CALLS)


async def test_the_time_of_a_node_is_its_own(bench: Make) -> None:
    text = do(ask("small", id="x"), ask("large", seconds=0.05))
    composed = await bench(text, small="draft", large=never).run()
    assert partial(composed) == ("draft", StopReason.DEADLINE)


async def test_a_partial_result_makes_all_that_rests_on_it_partial(bench: Make) -> None:
    inner = f"{{name: b, do: [{ask('small', id='x')}, {ask('large', seconds=0.05)}]}}"
    text = do(ask("pattern:b", id="y"), ask("lead", "{{y}}!"))
    composed = await bench(text, inner, small="5", large=never, lead=echo).run()
    assert partial(composed) == ("<5!>", StopReason.DEADLINE)


async def test_an_unforeseen_error_is_ours_and_says_nothing_of_itself(bench: Make) -> None:
    with pytest.raises(ServiceError, match=r"^the node 'ask x' failed$"):
        await bench(do(ask("small", id="x")), small=RuntimeError("secret path")).run()


async def test_a_pattern_that_left_the_pool_is_not_found(bench: Make) -> None:
    with pytest.raises(AtlasError, match="does not exist any more"):
        await bench(do(ask("small"))).run(name="gone")


@pytest.mark.parametrize("how", [{"n": 2}, {"logprobs": True}, {"stop": ["x"]}])
async def test_what_only_one_call_can_give_is_refused(bench: Make, how: Any) -> None:
    with pytest.raises(InvalidRequest):
        await bench(do(ask("small"))).run(**how)


# --- ask ----------------------------------------------------------------------------------------


async def test_an_answer_is_passed_through_unchanged(bench: Make) -> None:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": " 5\n", "reasoning": "hm"},
        "finish_reason": "length",
    }
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    deployment = bench(do(ask("small")), small={"choices": [choice], "usage": usage})
    composed = await deployment.run()
    passed = Choice(0, " 5\n", finish_reason="length", has_thought=True)
    assert composed == Composed([passed])


async def test_without_a_prompt_the_callers_own_messages_are_asked(bench: Make) -> None:
    deployment = bench(do(ask("small")))
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    await deployment.run(messages=messages, temperature=0.5, user="me")
    (body,) = deployment.engines.asked("small")
    assert body["messages"] == list(messages)
    assert body["temperature"] == 0.5
    assert "user" not in body


async def test_a_prompt_replaces_the_callers_messages(bench: Make) -> None:
    deployment = bench(do(ask("small", "Now: {{question}}", system="Be {{question}}.")))
    await deployment.run("brief")
    assert deployment.engines.asked("small")[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Now: brief"},
    ]


async def test_the_tokens_of_the_answer_are_the_callers_to_limit(bench: Make) -> None:
    deployment = bench(do(ask("small", id="x", max_tokens=40), ask("large", "{{x}}")))
    await deployment.run(max_tokens=7)
    (first,), (last,) = deployment.engines.asked("small"), deployment.engines.asked("large")
    assert (first["max_tokens"], last["max_tokens"]) == (40, 7)


async def test_the_router_chooses_within_the_nodes_options(bench: Make) -> None:
    text = "{name: a, do: [{ask: {route: {alpha: 0.75, models: [large], tools: [none]}}}]}"
    deployment = bench(text)
    deployment.chooser.order = {Pair("large", "none"): 0.9}
    assert await deployment.ask() == "large says hello"
    (limits,) = deployment.chooser.limits
    assert limits.alpha == 0.75
    assert (limits.models, limits.tools) == (frozenset({"large"}), frozenset({"none"}))


async def test_the_router_never_chooses_a_pattern_for_a_node(bench: Make) -> None:
    deployment = bench(do(ask("route")))
    await deployment.run()
    assert deployment.chooser.limits[0].models == frozenset({"small", "large", "lead", "judge"})


async def test_the_next_pair_answers_where_the_routers_choice_fails(bench: Make) -> None:
    deployment = bench(do(ask("route")), small=EngineError("broken"), large="6")
    assert await deployment.ask() == "6"


async def test_no_more_than_two_pairs_are_tried(bench: Make) -> None:
    broken = EngineError("broken")
    deployment = bench(do(ask("route")), small=broken, large=broken)
    deployment.chooser.order[Pair("lead", "none")] = 0.1
    with pytest.raises(EngineError, match="broken"):
        await deployment.run()
    assert deployment.engines.asked("lead") == []


async def test_a_pair_that_is_named_has_no_stand_in(bench: Make) -> None:
    with pytest.raises(EngineError, match="broken"):
        await bench(do(ask("small")), small=EngineError("broken")).run()


async def test_a_router_that_is_away_fails_the_node(bench: Make) -> None:
    deployment = bench(do(ask("route")))
    deployment.router.away.add("decide")
    with pytest.raises(EngineError, match="away"):
        await deployment.run()


async def test_an_engine_that_ends_its_call_by_itself_fails_the_node(bench: Make) -> None:
    def ended(_: Body) -> Awaitable[str]:
        async def end() -> str:
            raise asyncio.CancelledError

        return end()

    with pytest.raises(EngineError, match="ended before it was done"):
        await bench(do(ask("small")), small=ended).run()


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"type": "string"}},
    "required": ["kind"],
    "additionalProperties": False,
}


async def test_an_answer_that_fits_its_schema_can_be_read_by_others(bench: Make) -> None:
    text = do(ask("small", id="x", output=SCHEMA), ask("large", "{{x.data.kind}}"))
    deployment = bench(text, small='```json\n{"kind": "a"}\n```')
    await deployment.run()
    assert deployment.prompts("large") == ["a"]
    assert deployment.engines.asked("small")[0]["response_format"]["type"] == "json_schema"


async def test_an_answer_that_does_not_fit_is_asked_for_once_more(bench: Make) -> None:
    answers = iter(["no JSON", '{"kind": "a"}'])
    deployment = bench(do(ask("small", output=SCHEMA)), small=lambda _: next(answers))
    assert await deployment.ask() == '{"kind": "a"}'
    told = deployment.prompts("small")[1]
    assert told.startswith("That does not fit: it is not JSON")


async def test_an_answer_that_fits_not_even_then_fails(bench: Make) -> None:
    deployment = bench(do(ask("small", output=SCHEMA)), small='{"kind": 5}')
    with pytest.raises(EngineError, match=r"\['kind'\]: 5 is not of type 'string'"):
        await deployment.run()
    assert len(deployment.engines.asked("small")) == 2


async def test_an_odd_answer_is_read_at_once(bench: Make) -> None:
    odd = "```json" + "\n" * 60_000 + "x"
    with pytest.raises(EngineError, match="not JSON"):
        async with asyncio.timeout(20):
            await bench(do(ask("small", output=SCHEMA)), small=odd).run()


async def test_a_pattern_in_a_pattern_answers_with_its_own_limits(bench: Make) -> None:
    inner = f"{{name: b, limits: {{model_calls: 1}}, do: [{ask('small', id='x')}, {ask('large')}]}}"
    text = do(ask("pattern:b", "Part of {{question}}"))
    deployment = bench(text, inner, small=echo)
    assert partial(await deployment.run("it")) == ("<Part of it>", StopReason.MODEL_CALLS)


async def test_a_pattern_in_a_pattern_sees_nothing_of_the_outer_one(bench: Make) -> None:
    inner = f"{{name: b, do: [{ask('large', '{{question}}')}]}}"
    text = do(ask("small", id="x"), ask("pattern:b", "Of {{x}}"))
    deployment = bench(text, inner, small="5")
    await deployment.run("it")
    assert deployment.prompts("large") == ["Of 5"]


async def test_the_refusal_of_a_pattern_in_a_pattern_is_a_refusal(bench: Make) -> None:
    inner = "{name: b, do: [{refuse: {say: 'Not me.'}}]}"
    composed = await bench(do(ask("pattern:b", output=SCHEMA)), inner).run()
    assert (said(composed), composed.stop) == ("Not me.", StopReason.DECLINED)


async def test_a_pattern_that_is_asked_and_gone_is_no_candidate(bench: Make) -> None:
    deployment = bench(do(ask("pattern:b")), f"{{name: b, do: [{ask('small')}]}}")
    config = deployment.config
    deployment.runner.use(config.model_copy(update={"patterns": config.patterns[:1]}))
    with pytest.raises(NoCandidate, match="'b' does not exist any more"):
        await deployment.run()


# --- streams ------------------------------------------------------------------------------------


async def test_only_the_text_of_the_last_node_streams(bench: Make) -> None:
    deployment = bench(do(ask("small", id="x"), ask("large", "{{x}}")), large="answer")
    await deployment.run(stream=True)
    texts = [piece.text for piece in deployment.pieces]
    assert [text for text in texts if text] == ["ans", "wer"]
    assert [p.finish_reason for p in deployment.pieces if p.finish_reason] == ["stop"]


@pytest.mark.parametrize(
    "node",
    [
        ask("small", stream=False),
        ask("small", output={"properties": {}}),
        f"{{vote: {{of: [{ask('small')}, {ask('small')}]}}}}",
        f"{{critique: {{draft: {ask('small')}, critics: [{ask('large')}], "
        f"revise: {ask('small')}}}}}",
    ],
)
async def test_text_that_may_yet_change_is_sent_whole(bench: Make, node: str) -> None:
    deployment = bench(do(node), small='{"a": "long"}', large="OK")
    await deployment.run(stream=True)
    assert [piece.text for piece in deployment.pieces] == ['{"a": "long"}']


async def test_a_stream_that_a_deadline_cuts_is_the_partial_answer(bench: Make) -> None:
    deployment = bench(do(ask("small", id="x"), ask("large", seconds=1.0)), small="draft")
    deployment.engines.stream = _breaks_off(None)  # type: ignore[method-assign]
    composed = await deployment.run(stream=True)
    assert partial(composed) == ("begun", StopReason.DEADLINE)
    assert streamed(deployment) == "begun"
    assert deployment.pieces[-1].finish_reason == "length"


@pytest.mark.parametrize(
    "node",
    [
        f"{{cascade: {{of: [{ask('small')}, {ask('large')}], accept: {{min_logprob: -0.1}}}}}}",
        ask("route", route={"models": ["large", "lead"]}),
    ],
)
async def test_nothing_follows_a_stream_that_breaks(bench: Make, node: str) -> None:
    deployment = bench(do(node), small="doubtful", lead="another")
    deployment.chooser.order = {Pair("large", "none"): 0.9, Pair("lead", "none"): 0.5}
    deployment.engines.stream = _breaks_off(EngineError("broken"))  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="broken"):
        await deployment.run(stream=True)
    assert streamed(deployment) == "begun"


def _breaks_off(error: Exception | None) -> Any:
    """A stream that begins, and then fails or, without an error, hangs."""

    async def stream(model_id: str, body: Body, deadline: Any) -> Any:
        yield {"choices": [{"index": 0, "delta": {"content": "begun"}, "finish_reason": None}]}
        if error is not None:
            raise error
        await asyncio.Event().wait()

    return stream


# --- sources ------------------------------------------------------------------------------------


GOOD = "def f(x): return x + 1"
BAD = "def f(x): return x"
NO_CODE = "I cannot tell."


def tried(answer: str) -> ToolResult:
    """What the debug tool says of an answer."""
    if answer == NO_CODE:
        return ToolResult("There is no code in it.", {"kind": "none", "code": ""})
    if answer == GOOD:
        return ToolResult("f(1) returned 2", {"kind": "none", "code": "..."})
    return ToolResult("f(1) returned 1, expected 2", {"kind": "logic", "code": "..."})


def sources(*texts: str, **similarity: float) -> ToolResult:
    """What a search finds."""
    found = [
        {"id": f"s{n}", "title": f"T{n}", "text": text, "similarity": similarity.get(f"s{n}", 0.9)}
        for n, text in enumerate(texts, start=1)
    ]
    return ToolResult("\n".join(texts), {"sources": found})


RETRIEVE = "{retrieve: {id: found, corpus: handbook}}"


async def test_what_was_found_stands_before_the_question(bench: Make) -> None:
    deployment = bench(do(RETRIEVE, ask("small", uses=["found"])))
    deployment.tools.says["handbook"] = sources("Rest on Sundays.", "Work on Mondays.")
    await deployment.run("When?")
    assert deployment.prompts("small") == [
        "Sources:\n[1] Rest on Sundays.\n[2] Work on Mondays.\n\nQuestion: When?"
    ]


async def test_an_answer_has_the_sources_that_it_cites(bench: Make) -> None:
    text = do(RETRIEVE, ask("small", uses=["found"], cite="found"))
    deployment = bench(text, small="On Mondays [2].")
    deployment.tools.says["handbook"] = sources("Rest.", "Work.", "Play.")
    composed = await deployment.run()
    assert [source["id"] for source in composed.sources] == ["s2"]


async def test_an_answer_that_cites_nothing_has_all_sources(bench: Make) -> None:
    deployment = bench(do(RETRIEVE, ask("small", cite="found")))
    deployment.tools.says["handbook"] = sources("Rest.", "Work.")
    assert len((await deployment.run()).sources) == 2


async def test_a_citation_counts_among_the_sources_that_were_offered(bench: Make) -> None:
    check = "{verify: {of: x, check: citations}}"
    deployment = bench(do(RETRIEVE, ask("small", id="x", cite="found"), check), small="So [3].")
    deployment.tools.says["handbook"] = sources("Rest.", "Work.", "Play.")
    assert await deployment.ask() == "So [3]."


async def test_a_pattern_in_a_pattern_cites_what_it_was_offered(bench: Make) -> None:
    inner = f"{{name: b, do: [{ask('small')}]}}"
    text = do(RETRIEVE, ask("pattern:b", uses=["found"], cite="found"))
    deployment = bench(text, inner, small="On Mondays [2].")
    deployment.tools.says["handbook"] = sources("Rest.", "Work.")
    assert [source["id"] for source in (await deployment.run()).sources] == ["s2"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("", ["s1", "s2", "s3"]),
        (", top_k: 2", ["s1", "s2"]),
        (", min_score: 0.5", ["s1", "s3"]),
        (", has_names: true", ["s3"]),
        (", top_k: 1, has_names: true", ["s3"]),
    ],
)
async def test_only_sentences_near_enough_are_kept(
    bench: Make, options: str, kept: list[str]
) -> None:
    node = f"{{retrieve: {{id: found, corpus: handbook{options}}}}}"
    deployment = bench(do(node, ask("small", cite="found")))
    deployment.tools.says["handbook"] = sources("Oslo.", "Rome.", "Where Ada lives.", s2=0.4)
    composed = await deployment.run("Where does Ada live?")
    assert [source["id"] for source in composed.sources] == kept


async def test_a_query_without_a_word_finds_nothing(bench: Make) -> None:
    text = do(RETRIEVE, "{refuse: {when: {found.count: {lt: 1}}, say: Nothing.}}", ask("small"))
    deployment = bench(text)
    deployment.tools.says["handbook"] = ToolRetry("no word")
    assert await deployment.ask("?") == "Nothing."


async def test_a_least_similarity_needs_an_encoder(bench: Make) -> None:
    deployment = bench(do("{retrieve: {corpus: handbook, min_score: 0.1}}"))
    found: dict[str, Any] = {"sources": [{"text": "x", "similarity": None}]}
    deployment.tools.says["handbook"] = ToolResult("x", found)
    with pytest.raises(ToolFailed, match="no encoder"):
        await deployment.run()


# --- tool ---------------------------------------------------------------------------------------


async def test_a_tool_gets_its_arguments_filled_in(bench: Make) -> None:
    arguments = {"expression": "{{question}} + 1", "deep": ["{{question}}"]}
    node = json.dumps({"tool": {"tool": "calculator", "arguments": arguments}})
    deployment = bench(do(node))
    deployment.tools.says["calculator"] = "100"
    assert await deployment.ask("99") == "100"
    assert deployment.tools.calls == [
        ("calculator", {"expression": "99 + 1", "deep": ["99"]}),
    ]


async def test_a_tool_that_fails_fails_its_node(bench: Make) -> None:
    deployment = bench(do("{tool: {tool: calculator}}"))
    deployment.tools.says["calculator"] = ToolFailed("broken")
    with pytest.raises(ToolFailed, match="broken"):
        await deployment.run()


async def test_a_tool_beyond_the_cap_is_not_called(bench: Make) -> None:
    text = do(ask("small", id="x"), "{tool: {tool: calculator}}")
    deployment = bench(text, small="draft")
    composed = await deployment.run(caps=Caps(tool_calls=0))
    assert partial(composed) == ("draft", StopReason.TOOL_CALLS)
    assert deployment.tools.calls == []


# --- branch and refuse --------------------------------------------------------------------------

BRANCH = (
    "{branch: {cases: ["
    "{when: {question: {one_of: [a, b]}}, do: [{ask: {pair: small}}]},"
    "{when: {question: {gt: 10}}, do: [{ask: {pair: large}}]}]%s}}"
)


@pytest.mark.parametrize(
    ("question", "answer"),
    [("B", "small says hello"), ("11", "large says hello"), ("c", "lead says hello")],
)
async def test_a_branch_takes_the_first_way_that_holds(
    bench: Make, question: str, answer: str
) -> None:
    assert await bench(do(BRANCH % ", else: [{ask: {pair: lead}}]")).ask(question) == answer


async def test_a_branch_without_a_way_is_empty(bench: Make) -> None:
    node = (BRANCH % "").replace("{branch: {", "{branch: {id: way, ")
    text = do(node, "{refuse: {when: {way: {empty: true}}, say: Neither.}}")
    assert await bench(text).ask("c") == "Neither."


@pytest.mark.parametrize(
    ("condition", "refuses"),
    [
        ("found.count: {lt: 1}", True),
        ("found.count: {ge: 1}", False),
        ("found: {empty: true}", True),
    ],
)
async def test_an_empty_result_can_be_told(bench: Make, condition: str, refuses: bool) -> None:
    text = do(RETRIEVE, f"{{refuse: {{when: {{{condition}}}, say: Nothing.}}}}", ask("small"))
    deployment = bench(text)
    deployment.tools.says["handbook"] = sources()
    assert (await deployment.run()).stop == (
        StopReason.DECLINED if refuses else StopReason.ANSWERED
    )


async def test_a_refusal_ends_the_pattern_wherever_it_is(bench: Make) -> None:
    refuse = "{refuse: {say: 'No {{question}}.'}}"
    inner = f"{{branch: {{cases: [{{when: {{question: {{eq: x}}}}, do: [{refuse}]}}]}}}}"
    deployment = bench(do(inner, ask("small")))
    composed = await deployment.run("x", stream=True)
    assert (said(composed), composed.stop) == ("No x.", StopReason.DECLINED)
    assert streamed(deployment) == "No x."
    assert deployment.engines.bodies == []


async def test_a_last_refusal_that_does_not_refuse_leaves_the_answer(bench: Make) -> None:
    text = do(ask("small", id="x"), "{refuse: {when: {x: {empty: true}}}}")
    assert await bench(text, small="5").ask() == "5"


async def test_lists_and_numbers_of_results_are_counted(bench: Make) -> None:
    text = do(
        ask("small", id="x"),
        "{verify: {id: y, of: x, check: schema, output: {}}}",
        ask("large", "{{y.count}} {{y.data}} {{x.status}}"),
    )
    deployment = bench(text, small="5")
    await deployment.run()
    assert deployment.prompts("large") == ["0 5 ok"]


# --- parallel -----------------------------------------------------------------------------------


def parallel(*nodes: str, extra: str = "") -> str:
    return f"{{parallel: {{id: all, do: [{', '.join(nodes)}]{extra}}}}}"


async def test_nodes_side_by_side_are_put_together_in_their_order(bench: Make) -> None:
    released = asyncio.Event()

    def second(_: Body) -> str:
        released.set()
        return "2"

    async def first(_: Body) -> str:
        await released.wait()  # never, if one waited for the other
        return "1"

    deployment = bench(do(parallel(ask("small"), ask("large"))), small=first, large=second)
    assert await deployment.ask() == "1\n2"


async def test_one_node_runs_for_each_text(bench: Make) -> None:
    text = do(parallel(ask("small", "About {{item}}?"), extra=", each: [a, b]"))
    assert await bench(text, small=echo).ask() == "<About a?>\n<About b?>"


async def test_without_a_quorum_all_are_needed(bench: Make) -> None:
    deployment = bench(do(parallel(ask("small"), ask("large"))), large=EngineError("broken"))
    with pytest.raises(EngineError, match="broken"):
        await deployment.run()


async def test_a_quorum_ends_the_rest(bench: Make) -> None:
    text = do(parallel(ask("small"), ask("large"), ask("lead"), extra=", quorum: 2"))
    deployment = bench(text, small="1", large="2", lead=never)
    assert await deployment.ask() == "1\n2"
    assert deployment.budget.spent.model_calls == 3
    assert deployment.budget.left == (float("inf"),) * 4


async def test_a_quorum_that_cannot_be_reached_fails(bench: Make) -> None:
    text = do(parallel(ask("small"), ask("large"), extra=", quorum: 1"))
    broken = EngineError("broken")
    with pytest.raises(EngineError, match="broken"):
        await bench(text, small=broken, large=broken).run()


async def test_the_first_that_succeeds_is_passed_on_unchanged(bench: Make) -> None:
    text = do(parallel(ask("small"), ask("large"), ask("lead"), extra=", join: first"))
    deployment = bench(text, small=EngineError("broken"), large=" 2 ", lead=never)
    assert await deployment.ask() == " 2 "


async def test_a_node_joins_what_the_others_said(bench: Make) -> None:
    join = ask("lead", "{{answers}}?")
    text = do(parallel(ask("small"), ask("large"), extra=f", join: {join}"))
    deployment = bench(text, small="1", large="2", lead="both")
    assert await deployment.ask() == "both"
    assert deployment.prompts("lead") == ["1\n2?"]


def joined_backwards(texts: list[str]) -> str:
    return "+".join(reversed(texts))


def no_text(texts: list[str]) -> int:
    return len(texts)


async def test_a_function_joins_what_the_others_said(bench: Make) -> None:
    function = f", function: '{__name__}:joined_backwards'"
    text = do(parallel(ask("small"), ask("large"), extra=function))
    assert await bench(text, small="1", large="2").ask() == "2+1"


@pytest.mark.parametrize(
    ("function", "said"),
    [("no_text", "gave no text"), ("absent", "AttributeError"), ("EngineBusy", "gave no text")],
)
async def test_a_function_that_fails_says_so(bench: Make, function: str, said: str) -> None:
    text = do(parallel(ask("small"), extra=f", function: '{__name__}:{function}'"))
    with pytest.raises(ServiceError, match=said):
        await bench(text).run()


async def test_what_was_done_in_time_is_a_partial_answer(bench: Make) -> None:
    text = do(parallel(ask("small"), ask("large", seconds=0.05)))
    composed = await bench(text, small="1", large=never).run()
    assert partial(composed) == ("1", StopReason.DEADLINE)


async def test_a_join_that_a_cap_keeps_away_leaves_the_parts(bench: Make) -> None:
    text = do(parallel(ask("small"), ask("large"), extra=f", join: {ask('lead')}"))
    composed = await bench(text, small="1", large="2").run(caps=Caps(model_calls=2))
    assert partial(composed) == ("1\n2", StopReason.MODEL_CALLS)


async def test_side_by_side_calls_cannot_pass_a_cap_together(bench: Make) -> None:
    deployment = bench(do(parallel(ask("small"), ask("large"), ask("lead"))))
    composed = await deployment.run(caps=Caps(model_calls=2))
    assert composed.is_partial
    assert len(deployment.engines.bodies) == 2


async def test_what_others_see_of_many_results_is_bounded(bench: Make) -> None:
    text = do(parallel(*[ask("small")] * 4), ask("large", "{{all}}"))
    deployment = bench(text, small="x" * 4000)
    await deployment.run()
    assert len(deployment.prompts("large")[0]) == 8192


async def test_a_refusal_among_those_that_are_needed_is_the_result(bench: Make) -> None:
    composed = await bench(do(parallel(ask("small"), "{refuse: {say: 'No.'}}"))).run()
    assert (said(composed), composed.stop) == ("No.", StopReason.DECLINED)


# --- vote ---------------------------------------------------------------------------------------


def vote(*nodes: str, weights: str = "equal") -> str:
    return f"{{vote: {{id: most, of: [{', '.join(nodes)}], weights: {weights}}}}}"


THREE = (ask("small"), ask("large"), ask("lead"))


async def test_most_voices_win(bench: Make) -> None:
    deployment = bench(do(vote(*THREE)), small="5", large="6", lead="The answer is 5.")
    assert await deployment.ask() == "5"


async def test_a_voice_weighs_what_the_router_expects_of_it(bench: Make) -> None:
    deployment = bench(do(vote(*THREE, weights="profile")), small="5", large="6", lead="5")
    deployment.chooser.order = {
        Pair("small", "none"): 0.6, Pair("large", "none"): 0.9, Pair("lead", "none"): 0.6
    }  # fmt: skip
    assert await deployment.ask() == "6"


async def test_all_voices_weigh_the_same_where_the_router_is_away(bench: Make) -> None:
    deployment = bench(do(vote(*THREE, weights="profile")), small="5", large="6", lead="5")
    deployment.router.away.add("decide")
    assert await deployment.ask() == "5"


@pytest.mark.parametrize(
    ("quality", "weight"), [(0.5, 0.1), (0.2, 0.1), (0.75, 1.0986), (1.0, 2.9444)]
)
def test_a_voice_weighs_its_log_odds_within_reason(quality: float, weight: float) -> None:
    assert log_odds(quality) == pytest.approx(weight, abs=1e-4)


async def test_a_vote_ends_when_no_voice_can_change_it(bench: Make) -> None:
    deployment = bench(do(vote(*THREE)), small="5", large="5", lead=never)
    assert await deployment.ask() == "5"


async def test_a_vote_waits_while_a_voice_can_still_change_it(bench: Make) -> None:
    both_said = asyncio.Event()
    heard = 0

    def counted(answer: str) -> Callable[[Body], str]:
        def say(_: Body) -> str:
            nonlocal heard
            heard += 1
            if heard == 2:
                both_said.set()
            return answer

        return say

    async def last(_: Body) -> str:
        await both_said.wait()
        return "6"

    deployment = bench(do(vote(*THREE)), small=counted("5"), large=counted("6"), lead=last)
    assert await deployment.ask() == "6"


async def test_voices_that_are_ended_are_settled(bench: Make) -> None:
    deployment = bench(do(vote(*THREE)), small="5", large="5", lead=never)
    await deployment.run(caps=Caps(usd=1.0, tokens=10_000, model_calls=10))
    spent, left = deployment.budget.spent, deployment.budget.left
    assert spent.model_calls == 3
    assert spent.tokens + left.tokens == pytest.approx(10_000)
    assert spent.usd + left.usd == pytest.approx(1.0)


async def test_a_conflict_is_reported_with_its_sides(bench: Make) -> None:
    text = do(vote(*THREE), ask("small", "{{most.data}}", id="told"))
    deployment = bench(text, small="5", large="6", lead="5")
    await deployment.run()
    assert json.loads(deployment.prompts("small")[1]) == {
        "sides": [
            {"answer": "5", "weight": 2.0, "pairs": ["small@none", "lead@none"]},
            {"answer": "6", "weight": 1.0, "pairs": ["large@none"]},
        ],
        "conflict": True,
    }


async def test_voices_that_agree_are_no_conflict(bench: Make) -> None:
    text = do(vote(*THREE), ask("small", "{{most.data.conflict}}"))
    deployment = bench(text, small="5", large="5", lead="5")
    await deployment.run()
    assert deployment.prompts("small")[1] == "false"


async def test_a_pattern_that_votes_is_named(bench: Make) -> None:
    inner = f"{{name: b, do: [{ask('large')}]}}"
    node = vote(ask("pattern:b"), ask("lead"))
    text = do(node, ask("small", "{{most.data.sides}}"))
    deployment = bench(text, inner, large="5", lead="6")
    await deployment.run()
    assert "pattern:b" in deployment.prompts("small")[0]


async def test_a_voice_that_fails_does_not_count(bench: Make) -> None:
    deployment = bench(do(vote(*THREE)), small=EngineError("broken"), large=" ", lead="5")
    composed = await deployment.run()
    assert (said(composed), composed.is_partial) == ("5", False)


async def test_a_vote_without_a_voice_fails_with_what_is_wrong(bench: Make) -> None:
    late = ask("large", seconds=0.05)
    deployment = bench(do(vote(ask("small"), late)), small=EngineError("broken"), large=never)
    with pytest.raises(EngineError, match="broken"):
        await deployment.run()


async def test_an_undecided_vote_at_a_deadline_is_partial(bench: Make) -> None:
    late = ask("large", seconds=0.05)
    composed = await bench(do(vote(ask("small"), late)), small="5", large=never).run()
    assert partial(composed) == ("5", StopReason.DEADLINE)


async def test_voices_that_all_refuse_are_a_refusal(bench: Make) -> None:
    inner = "{name: b, do: [{refuse: {say: 'No.'}}]}"
    composed = await bench(do(vote(ask("pattern:b"), ask("pattern:b"))), inner).run()
    assert (said(composed), composed.stop) == ("No.", StopReason.DECLINED)


# --- cascade ------------------------------------------------------------------------------------


def cascade(accept: str, *nodes: str) -> str:
    rungs = nodes or (ask("small"), ask("large"))
    return f"{{cascade: {{of: [{', '.join(rungs)}], accept: {{{accept}}}}}}}"


@pytest.mark.parametrize(("least", "answer"), [(-0.3, "5"), (-0.2, "6")])
async def test_a_sure_answer_is_accepted(bench: Make, least: float, answer: str) -> None:
    text = do(cascade(f"min_logprob: {least}"))
    assert await bench(text, small="5", large="6").ask() == answer  # engines say -0.25


async def test_the_last_rung_is_not_asked_for_probabilities(bench: Make) -> None:
    deployment = bench(do(cascade("min_logprob: -0.1")))
    await deployment.run()
    assert deployment.engines.asked("small")[0].get("logprobs") is True
    assert "logprobs" not in deployment.engines.asked("large")[0]


async def test_an_engine_without_probabilities_is_never_sure(bench: Make) -> None:
    def plain(body: Body) -> Any:
        return InvalidRequest("no logprobs here") if body.get("logprobs") else "5"

    deployment = bench(do(cascade("min_logprob: -9")), small=plain, large="6")
    assert await deployment.ask() == "6"


@pytest.mark.parametrize(("score", "answer"), [("0.8", "5"), ("0.4", "6")])
async def test_a_verifier_accepts(bench: Make, score: str, answer: str) -> None:
    deployment = bench(do(cascade("verifier: judge")), small="5", large="6", judge=score)
    assert await deployment.ask() == answer


async def test_a_verifier_that_fails_accepts_nothing(bench: Make) -> None:
    broken = EngineError("broken")
    deployment = bench(do(cascade("verifier: judge")), small="5", large="6", judge=broken)
    assert await deployment.ask() == "6"


async def test_an_answer_that_was_given_before_is_accepted(bench: Make) -> None:
    node = cascade("agrees: true", *THREE)
    deployment = bench(do(node), small="5", large="5.0", lead="7")
    assert await deployment.ask() == "5.0"
    assert deployment.engines.asked("lead") == []


async def test_the_first_answer_agrees_with_none(bench: Make) -> None:
    deployment = bench(do(cascade("agrees: true")), small="5", large="6")
    assert await deployment.ask() == "6"


@pytest.mark.parametrize(("said", "answer"), [("42", "42"), ("about 42", "6"), ("", "6")])
async def test_an_answer_that_matches_is_accepted(bench: Make, said: str, answer: str) -> None:
    deployment = bench(do(cascade("pattern: '[0-9]*'")), small=said, large="6")
    assert await deployment.ask() == answer


@pytest.mark.parametrize(("first", "answer"), [(GOOD, GOOD), (BAD, "6"), (NO_CODE, "6")])
async def test_code_that_does_what_the_examples_say_is_accepted(
    bench: Make, first: str, answer: str
) -> None:
    deployment = bench(do(cascade("examples: debug")), small=first, large="6")
    deployment.tools.says["debug"] = lambda arguments: tried(arguments["code"])
    assert said(await deployment.run("Write f.\nf(1) == 2")) == answer


async def test_examples_that_cannot_be_tried_accept_nothing(bench: Make) -> None:
    deployment = bench(do(cascade("examples: debug")), small=GOOD, large="6")
    deployment.tools.says["debug"] = ToolFailed("no sandbox")
    assert said(await deployment.run("Write f.\nf(1) == 2")) == "6"


async def test_all_that_is_named_must_hold(bench: Make) -> None:
    deployment = bench(do(cascade("pattern: '[0-9]+', min_logprob: -0.1")), small="5", large="6")
    assert await deployment.ask() == "6"


async def test_a_rung_that_fails_is_passed_over(bench: Make) -> None:
    deployment = bench(do(cascade("agrees: true")), small=EngineError("broken"), large="6")
    assert await deployment.ask() == "6"


async def test_a_rung_that_is_late_by_its_own_time_is_passed_over(bench: Make) -> None:
    node = cascade("agrees: true", ask("small"), ask("large", seconds=0.05), ask("lead"))
    deployment = bench(do(node), small="5", large=never, lead="7")
    assert await deployment.ask() == "7"


async def test_a_doubtful_answer_is_partial_where_the_last_rung_fails(bench: Make) -> None:
    deployment = bench(do(cascade("agrees: true")), small="5", large=EngineError("broken"))
    assert partial(await deployment.run()) == ("5", StopReason.FAILED)


async def test_a_cap_before_the_next_rung_leaves_the_doubtful_answer(bench: Make) -> None:
    composed = await bench(do(cascade("agrees: true")), small="5").run(caps=Caps(model_calls=1))
    assert partial(composed) == ("5", StopReason.MODEL_CALLS)


async def test_a_rung_that_refuses_is_never_a_doubtful_answer(bench: Make) -> None:
    inner = "{name: b, do: [{refuse: {say: 'No.'}}]}"
    node = cascade("agrees: true", ask("pattern:b"), ask("large"))
    with pytest.raises(EngineError, match="broken"):
        await bench(do(node), inner, large=EngineError("broken")).run()


# --- critique -----------------------------------------------------------------------------------


def critique(*critics: str, revise: str = "{{draft}} / {{objections}}") -> str:
    return (
        f"{{critique: {{draft: {ask('small')}, critics: [{', '.join(critics)}], "
        f"revise: {ask('large', revise)}}}}}"
    )


LONG = "{verify: {of: draft, check: length, min_chars: 4}}"
NUMBER = "{verify: {of: draft, check: pattern, pattern: '[0-9]+'}}"
READER = ask("lead", "Look: {{draft}}")


async def test_a_revision_may_be_a_cascade(bench: Make) -> None:
    reviser = cascade(
        "pattern: '[0-9]+'", ask("large", "Mend {{draft}}"), ask("lead", "{{objections}}")
    )
    node = f"{{critique: {{draft: {ask('small')}, critics: [{LONG}], revise: {reviser}}}}}"
    deployment = bench(do(node), small="5", large="still five", lead="12345")
    assert await deployment.ask() == "12345"
    assert deployment.prompts("large") == ["Mend 5"]


async def test_a_draft_without_objections_is_the_answer(bench: Make) -> None:
    deployment = bench(do(critique(LONG, READER)), small="12345", lead="ok.")
    assert await deployment.ask() == "12345"
    assert deployment.engines.asked("large") == []


async def test_objections_are_told_to_whoever_revises(bench: Make) -> None:
    deployment = bench(do(critique(LONG, READER)), small="123", lead="Too low.", large="12345")
    assert await deployment.ask() == "12345"
    assert deployment.prompts("large") == ["123 / it has 3 characters\nToo low."]


async def test_there_is_one_revision_at_most(bench: Make) -> None:
    deployment = bench(do(critique(LONG)), small="1", large="2")
    assert await deployment.ask() == "2"
    assert len(deployment.engines.asked("large")) == 1


async def test_a_revision_that_is_worse_is_dropped(bench: Make) -> None:
    deployment = bench(do(critique(LONG, NUMBER)), small="123", large="a")
    assert await deployment.ask() == "123"


async def test_a_readers_objection_does_not_excuse_a_failed_check(bench: Make) -> None:
    deployment = bench(do(critique(LONG, READER)), small="12345", lead="Too low.", large="1")
    assert await deployment.ask() == "12345"


async def test_a_draft_that_speaks_of_a_fault_has_none(bench: Make) -> None:
    schema = "{verify: {of: draft, check: schema, output: {type: object}}}"
    deployment = bench(do(critique(schema)), small='{"fault": "none"}')
    assert await deployment.ask() == '{"fault": "none"}'
    assert deployment.engines.asked("large") == []


async def test_a_critic_that_fails_has_no_objection(bench: Make) -> None:
    deployment = bench(do(critique(READER)), small="5", lead=EngineError("broken"))
    assert await deployment.ask() == "5"


async def test_the_draft_stays_where_the_reviser_fails(bench: Make) -> None:
    deployment = bench(do(critique(LONG)), small="5", large=EngineError("broken"))
    composed = await deployment.run()
    assert (said(composed), composed.is_partial) == ("5", False)


@pytest.mark.parametrize("model_calls", [1, 2])
async def test_a_draft_without_critics_or_revision_is_partial(
    bench: Make, model_calls: int
) -> None:
    deployment = bench(do(critique(READER)), small="5", lead="Too low.")
    composed = await deployment.run(caps=Caps(model_calls=model_calls))
    assert partial(composed) == ("5", StopReason.MODEL_CALLS)


async def test_without_a_draft_there_is_no_answer(bench: Make) -> None:
    with pytest.raises(EngineError, match="broken"):
        await bench(do(critique(LONG)), small=EngineError("broken")).run()


# --- plan ---------------------------------------------------------------------------------------


def plan(extra: str = "", worker: str = "{{subtask}}") -> str:
    return (
        f"{{plan: {{id: planned, lead: {ask('lead', 'Split: {{question}}')}, "
        f"worker: {ask('small', worker)}{extra}}}}}"
    )


JOIN = f", join: {ask('large', 'All: {{answers}}')}"


def subtasks(**asks: str) -> str:
    """A lead's answer."""
    return json.dumps({"subtasks": [{"id": name, "ask": text} for name, text in asks.items()]})


async def test_a_part_asks_with_the_answers_that_it_needs(bench: Make) -> None:
    split = subtasks(a="first?", b="second of {{a}}?", c="third?")
    deployment = bench(do(plan()), lead=split, small=echo)
    assert await deployment.ask() == "<second of <first?>?>\n<third?>"


async def test_an_answer_with_references_in_it_is_not_filled_again(bench: Make) -> None:
    split = subtasks(a="first?", b="of {{a}}?")
    deployment = bench(do(plan()), lead=split, small=lambda body: "{{subtask}} {{question}}")
    await deployment.run()
    assert deployment.prompts("small")[1] == "of {{subtask}} {{question}}?"


async def test_parts_begin_when_what_they_need_is_there(bench: Make) -> None:
    gates = {name: asyncio.Event() for name in ("one", "two", "three <one>", "four")}
    begun: list[str] = []

    async def work(body: Body) -> str:
        question = body["messages"][-1]["content"]
        begun.append(question)
        await gates[question].wait()
        return f"<{question}>"

    async def until(*questions: str) -> None:
        async with asyncio.timeout(20):
            while sorted(begun) != sorted(questions):
                await asyncio.sleep(0)

    split = subtasks(a="one", b="two", c="three {{a}}", d="four")
    deployment = bench(do(plan()), lead=split, small=work)
    task = asyncio.create_task(deployment.run())
    await until("one", "two", "four")  # what needs nothing begins at once, the rest does not
    gates["two"].set()
    for _ in range(50):
        await asyncio.sleep(0)
    assert "three <one>" not in begun  # another part's end does not begin it
    gates["one"].set()
    await until("one", "two", "four", "three <one>")  # though `four` is not done
    for gate in gates.values():
        gate.set()
    assert said(await task) == "<two>\n<three <one>>\n<four>"


async def test_a_question_is_not_asked_twice(bench: Make) -> None:
    split = subtasks(a="same?", b="same?", c="of {{a}}", d="of {{b}}")
    deployment = bench(do(plan()), lead=split, small=echo)
    assert await deployment.ask() == "<of <same?>>\n<of <same?>>"
    assert deployment.prompts("small") == ["same?", "of <same?>"]


@pytest.mark.parametrize("malformed", ["no plan", '{"subtasks": []}', subtasks(b="of {{c}}")])
async def test_a_lead_without_a_plan_is_asked_once_more(bench: Make, malformed: str) -> None:
    answers = iter([malformed, subtasks(a="first?")])
    deployment = bench(do(plan()), lead=lambda _: next(answers), small=echo)
    assert await deployment.ask() == "<first?>"


async def test_without_a_plan_the_question_is_one_part(bench: Make) -> None:
    deployment = bench(do(plan()), lead="no plan", small=echo)
    assert await deployment.ask("Why {{so}}?") == "<Why {{so}}?>"
    assert len(deployment.engines.asked("lead")) == 2


async def test_with_a_lead_that_fails_the_question_is_one_part(bench: Make) -> None:
    deployment = bench(do(plan()), lead=EngineError("broken"), small=echo)
    assert await deployment.ask("Why?") == "<Why?>"


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        (subtasks(a="x", b="y", c="z"), "more than 2"),
        (subtasks(a="{{b}}", b="y"), "refers to what comes later"),
        (subtasks(a="{{a}}"), "refers to what comes later"),
        (subtasks(a="x {{"), "without a reference"),
        (subtasks(A="x"), "does not match"),
        (subtasks(a=""), "non-empty"),
        (json.dumps({"subtasks": [{"id": "a", "ask": "x"}] * 2}), "there twice"),
        (subtasks(a="{{" + " " * 3900), "without a reference"),
    ],
)
def test_a_malformed_plan_is_told(written: str, fault: str) -> None:
    read, why = read_plan(written, 2)
    assert read is None
    assert re.search(fault, why or "")


async def test_a_part_that_fails_leaves_a_partial_answer(bench: Make) -> None:
    def work(body: Body) -> Any:
        question = body["messages"][-1]["content"]
        return EngineError("broken") if question == "bad" else f"<{question}>"

    split = subtasks(a="good", b="bad", c="of {{b}}")
    deployment = bench(do(plan()), lead=split, small=work)
    assert partial(await deployment.run()) == ("<good>", StopReason.FAILED)
    assert deployment.prompts("small") == ["good", "bad"]


async def test_a_plan_without_an_answered_part_fails(bench: Make) -> None:
    deployment = bench(do(plan()), lead=subtasks(a="x"), small=EngineError("broken"))
    with pytest.raises(EngineError, match="broken"):
        await deployment.run()


async def test_a_part_that_is_late_leaves_a_partial_answer(bench: Make) -> None:
    def work(body: Body) -> Any:
        return never(body) if body["messages"][-1]["content"] == "slow" else "done"

    text = do(plan().replace('"prompt": "{{subtask}}"', '"prompt": "{{subtask}}", "seconds": 1.0'))
    deployment = bench(text, lead=subtasks(a="fast", b="slow"), small=work)
    assert partial(await deployment.run()) == ("done", StopReason.DEADLINE)


async def test_a_join_reads_every_part_by_its_name(bench: Make) -> None:
    deployment = bench(do(plan(JOIN)), lead=subtasks(a="x", b="of {{a}}"), small=echo, large="J")
    assert await deployment.ask() == "J"
    assert deployment.prompts("large") == ["All: a: <x>\nb: <of <x>>"]


async def test_a_join_has_calls_kept_back_for_it(bench: Make) -> None:
    many = subtasks(**{name: f"part {name}" for name in "abcdef"})
    deployment = bench(do(plan(JOIN)), lead=many, small=echo, large="J")
    composed = await deployment.run(caps=Caps(model_calls=6))
    assert partial(composed) == ("J", StopReason.MODEL_CALLS)
    assert len(deployment.engines.asked("small")) == 4


async def test_a_join_has_time_kept_back_for_it(bench: Make) -> None:
    def work(body: Body) -> Any:
        return never(body) if body["messages"][-1]["content"] == "slow" else "done"

    deployment = bench(
        do(plan(JOIN + ", reserve: 0.7")), lead=subtasks(a="x", b="slow"), small=work, large="J"
    )
    assert partial(await deployment.run(seconds=3)) == ("J", StopReason.DEADLINE)


async def test_workers_get_a_call_even_where_there_is_one_alone(bench: Make) -> None:
    deployment = bench(do(plan(JOIN)), lead=subtasks(a="x"), small=echo)
    composed = await deployment.run(caps=Caps(model_calls=2))
    assert partial(composed) == ("<x>", StopReason.MODEL_CALLS)


async def test_the_join_of_a_plan_streams(bench: Make) -> None:
    deployment = bench(do(plan(JOIN)), lead=subtasks(a="x"), small=echo, large="joined")
    await deployment.run(stream=True)
    assert streamed(deployment) == "joined"
    assert len(deployment.pieces) > 1


# --- verify -------------------------------------------------------------------------------------


def verify(fields: str, *, otherwise: str = "refuse") -> str:
    return f"{{verify: {{id: checked, of: x, {fields}, else: {otherwise}, say: 'No.'}}}}"


SOURCED = "sources: found, check: "
CHECKS: list[tuple[str, str, bool]] = [
    ("check: schema, output: {type: array}", "[1]", True),
    ("check: schema, output: {type: array}", "1", False),
    ("check: pattern, pattern: '[0-9]+'", " 12\n", True),
    ("check: pattern, pattern: '[0-9]+'", "12 or so", False),
    ("check: length, max_chars: 3", "abc", True),
    ("check: length, max_chars: 3", "abcd", False),
    ("check: length", "", False),
    (f"{SOURCED}grounded", "Ada has 3 cats.", True),
    (f"{SOURCED}grounded", "Ada has 4 cats.", False),
    (f"{SOURCED}grounded", "Bob has 3 cats.", False),
    (f"{SOURCED}citations", "So it is [1].", True),
    (f"{SOURCED}citations", "So it is [2].", False),
    (f"{SOURCED}citations", "So it is.", False),
    ("check: verifier, verifier: judge, min_score: 0.7", "0.7", True),
    ("check: verifier, verifier: judge, min_score: 0.7", "0.6", False),
    ("check: examples, tool: debug", GOOD, True),
    ("check: examples, tool: debug", BAD, False),
    ("check: examples, tool: debug", NO_CODE, False),
]


def checked(bench: Make, fields: str, answer: str, *more: str, otherwise: str) -> PatternBench:
    text = do(RETRIEVE, ask("small", id="x"), verify(fields, otherwise=otherwise), *more)
    deployment = bench(text, small=answer, judge=answer)
    deployment.tools.says["handbook"] = sources("Ada has 3 cats.")
    deployment.tools.says["debug"] = lambda arguments: tried(arguments["code"])
    return deployment


@pytest.mark.parametrize(("fields", "answer", "passes"), CHECKS)
async def test_a_check_passes_what_it_should(
    bench: Make, fields: str, answer: str, passes: bool
) -> None:
    composed = await checked(bench, fields, answer, otherwise="refuse").run("Write f.\nf(1) == 2")
    assert (said(composed), composed.stop) == (
        (answer, StopReason.ANSWERED) if passes else ("No.", StopReason.DECLINED)
    )


async def test_a_failed_check_can_be_an_error(bench: Make) -> None:
    deployment = checked(bench, "check: length, max_chars: 3", "abcd", otherwise="fail")
    with pytest.raises(EngineError, match="'length': it has 4 characters"):
        await deployment.run()


async def test_a_failed_check_can_be_kept_and_told(bench: Make) -> None:
    more = ask("large", "{{checked}}: {{checked.data.fault}}")
    deployment = checked(bench, "check: length, max_chars: 3", "abcd", more, otherwise="keep")
    await deployment.run()
    assert deployment.prompts("large") == ["abcd: it has 4 characters"]


async def test_what_passes_a_schema_can_be_read_by_others(bench: Make) -> None:
    more = ask("large", "{{checked.data.0.k}}")
    deployment = checked(
        bench, "check: schema, output: {type: array}", '[{"k": 7}]', more, otherwise="refuse"
    )
    await deployment.run()
    assert deployment.prompts("large") == ["7"]


async def test_code_without_an_example_to_try_passes(bench: Make) -> None:
    deployment = checked(bench, "check: examples, tool: debug", BAD, otherwise="refuse")
    assert await deployment.ask("Write f.") == BAD
    assert [tool_id for tool_id, _ in deployment.tools.calls] == ["handbook"]


async def test_what_the_code_does_instead_is_the_fault(bench: Make) -> None:
    deployment = checked(bench, "check: examples, tool: debug", BAD, otherwise="fail")
    with pytest.raises(EngineError, match=re.escape("f(1) returned 1, expected 2")):
        await deployment.run("f(1) == 2")


@pytest.mark.parametrize("failure", [ToolRetry("code: too long"), ToolTimeout("too slow")])
async def test_code_that_the_tool_cannot_take_does_not_pass(
    bench: Make, failure: AtlasError
) -> None:
    deployment = checked(bench, "check: examples, tool: debug", GOOD, otherwise="fail")
    deployment.tools.says["debug"] = failure
    with pytest.raises(EngineError, match=failure.message):
        await deployment.run("f(1) == 2")


async def test_a_check_that_cannot_be_made_fails(bench: Make) -> None:
    deployment = checked(bench, "check: examples, tool: debug", GOOD, otherwise="refuse")
    deployment.tools.says["debug"] = ToolFailed("no sandbox")
    with pytest.raises(ToolFailed, match="no sandbox"):
        await deployment.run("f(1) == 2")


async def test_a_verifier_reads_no_more_than_others_see(bench: Make) -> None:
    text = do(
        ask("small", id="x", max_bytes=16),
        "{verify: {of: x, check: verifier, verifier: judge}}",
    )
    deployment = bench(text, small="y" * 100, judge="1")
    assert await deployment.ask() == "y" * 100
    assert deployment.prompts("judge") == ["y" * 16]


async def test_a_check_that_a_cap_keeps_away_leaves_a_partial_answer(bench: Make) -> None:
    text = do(ask("small", id="x"), "{verify: {of: x, check: verifier, verifier: judge}}")
    composed = await bench(text, small="5").run(caps=Caps(model_calls=1))
    assert partial(composed) == ("5", StopReason.MODEL_CALLS)


# --- recovery -----------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [EngineUnavailable("down"), EngineBusy("busy")])
async def test_a_failure_that_may_pass_is_the_next_pairs_chance(
    bench: Make, failure: AtlasError
) -> None:
    assert await bench(do(ask("route")), small=failure, large="6").ask() == "6"


async def test_a_pair_that_is_slow_leaves_time_for_the_next(bench: Make) -> None:
    deployment = bench(do(ask("route")), small=never, large="6")
    assert await deployment.ask(seconds=1.5) == "6"


async def test_a_late_answer_is_a_deadline(bench: Make) -> None:
    with pytest.raises(DeadlineExceeded):
        await bench(do(ask("small")), small=never).run(seconds=0.2)


async def test_a_lead_without_a_plan_is_told_what_is_wrong(bench: Make) -> None:
    deployment = bench(do("{plan: {lead: {ask: {pair: lead}}, worker: {ask: {pair: small}}}}"))
    deployment.engines.says["lead"] = "no plan"
    await deployment.ask("What?")
    first, second = deployment.engines.asked("lead")
    assert len(first["messages"]) == 1
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert "it is not JSON" in second["messages"][-1]["content"]


async def test_a_long_question_without_a_plan_is_an_error_and_not_cut(bench: Make) -> None:
    deployment = bench(do("{plan: {lead: {ask: {pair: lead}}, worker: {ask: {pair: small}}}}"))
    deployment.engines.says["lead"] = "no plan"
    with pytest.raises(EngineError, match="the lead gives no plan"):
        await deployment.run("word " * 2000)
    assert deployment.engines.asked("small") == []


async def test_sentences_that_were_looked_up_are_no_answer_at_a_cap(bench: Make) -> None:
    deployment = bench(
        do("{retrieve: {id: found, corpus: handbook}}", "{ask: {pair: small, uses: [found]}}")
    )
    sources = {"sources": [{"id": "1", "title": "", "text": "A sentence.", "similarity": 1.0}]}
    deployment.tools.says["handbook"] = ToolResult("[1] A sentence.", sources)
    deployment.engines.says["small"] = BudgetExceeded("no more", None, 1.0, "usd")
    with pytest.raises(BudgetExceeded):
        await deployment.run()


async def test_a_quorum_that_cannot_be_reached_any_more_is_not_waited_for(bench: Make) -> None:
    deployment = bench(
        do("{parallel: {do: [{ask: {pair: small}}, {ask: {pair: large}}], quorum: 2}}")
    )
    deployment.engines.says["small"] = EngineError("broken")
    deployment.engines.says["large"] = lambda body: asyncio.sleep(60)
    with pytest.raises(EngineError, match="broken"):
        await deployment.run(seconds=50.0)
    assert deployment.budget.seconds_left > 20


LARGE_FIRST = "{vote: {of: [{ask: {pair: large}}, {ask: {pair: small}}, {ask: {pair: lead}}]}}"


async def test_before_anything_is_profiled_every_voice_weighs_the_same(bench: Make) -> None:
    deployment = bench(do(LARGE_FIRST))
    deployment.chooser.path = DecidedBy.COLD_START
    deployment.chooser.order = {Pair("large", "none"): 0.95, Pair("small", "none"): 0.05}
    deployment.engines.says |= {"large": "1", "small": "2", "lead": "2"}
    assert await deployment.ask() == "2"


async def test_of_sides_with_the_same_weight_that_of_the_earlier_voice_wins(bench: Make) -> None:
    deployment = bench(do(LARGE_FIRST))
    deployment.chooser.path = DecidedBy.COLD_START

    async def slow(body: Any) -> str:
        await asyncio.sleep(0.05)
        return "1"

    deployment.engines.says |= {"large": slow, "small": "2", "lead": "3"}
    assert await deployment.ask() == "1"
