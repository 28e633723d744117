"""Scoring: what each metric counts as right, and that no answer can break it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app import scoring
from serve_app.errors import ConfigError, ToolFailed
from serve_app.questions import Question
from serve_app.schemas import ToolCall
from serve_app.scoring import GivenAnswer, Scored, measure, score
from serve_app.tools.sandbox.client import GRACE_S, sandbox_server

CODE = "Here it is:\n\n```python\ndef solution(x):\n    return x + 1\n```\n\nIt adds one."
TESTS = ["assert solution(1) == 2", "assert solution(-1) == 0"]


def question(metric: Any, gold: Any = None) -> Question:
    return Question(id="q", query="What is it?", metric=metric, gold=gold)


def unit_tests(*tests: str) -> Question:
    return question({"name": "unit_tests", "tests": tests or TESTS})


def call(name: str, arguments: dict[str, Any]) -> ToolCall:
    return ToolCall(tool_id=name, arguments=arguments, ok=True, text="", seconds=0.0)


def judge_saying(*replies: str) -> scoring.Judge:
    left = list(replies)

    async def judge(prompt: str) -> str:
        return left.pop(0)

    return judge


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (1234.5, "1,234.5"),
        (1234.5, "That makes $1,234.50 in all."),
        (-3, "It is \u22123"),
        (-20, "a loss of -$20"),
        (12.5, "12.5%"),
        (0.95, ".95"),
        (3e-5, "about 3.0e-5"),
        (120000, "1.2 x 10^5"),
        (120000, "$1.2 \\times 10^{5}$ metres"),
        (3e8, "3\u00d710⁸ m/s"),
        (35, "35 m^2"),
        (42, "6 * 7 = 42"),
        (42, "I add 40 and 2.\n#### 42\n(2 steps)"),
        (42, "So \\boxed{42}, found in 3 steps."),
        (7, "The answer is 3 + 4 = 7."),
        (7, "**Answer:** 7 of the 12. I am 100% sure."),
        (42, "The answer is:\n\n42"),
        ("1e3", "1000"),
    ],
)
def test_the_number_an_answer_ends_on_is_compared(gold: Any, answer: str) -> None:
    assert measure(question("numeric", gold), GivenAnswer(answer)) == 1.0


@pytest.mark.parametrize("answer", ["43", "I do not know.", "42 is not it: 41", "nan", "9" * 5000])
def test_another_number_or_none_scores_nothing(answer: str) -> None:
    assert measure(question("numeric", 42), GivenAnswer(answer)) == 0.0


def test_the_tolerance_is_a_share_of_the_gold_number() -> None:
    metric = {"name": "numeric", "tolerance": 0.01}
    assert measure(question(metric, 200), GivenAnswer("202")) == 1.0
    assert measure(question(metric, 200), GivenAnswer("202.1")) == 0.0


def test_exact_ignores_outer_white_space_only() -> None:
    assert measure(question("exact", "Nile"), GivenAnswer(" Nile\n")) == 1.0
    assert measure(question("exact", "Nile"), GivenAnswer("nile")) == 0.0


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("The Nile", "nile.", True),
        (["NYC", "New York City"], "new  york city", True),
        ("Battle of the Bulge", "battle of Bulge!", True),
        ("1234", "1,234", True),
        ("[-3, 5]", "[3, -5]", False),
        ("3.5", "35", False),
        ("['a', 'r']", "['r']", False),
        ("A", "a", True),
        ("+", "-", False),
    ],
)
def test_normalised_ignores_case_articles_and_punctuation_but_not_signs(
    gold: Any, answer: str, right: bool
) -> None:
    assert measure(question("normalised", gold), GivenAnswer(answer)) == float(right)


def test_f1_is_the_overlap_of_the_words_with_the_best_gold_answer() -> None:
    asked = question("f1", ["red fox", "a quick brown fox"])
    assert measure(asked, GivenAnswer("The quick fox")) == pytest.approx(2 * 2 / (2 + 3))
    assert measure(asked, GivenAnswer("Red fox.")) == 1.0
    assert measure(asked, GivenAnswer("dog")) == 0.0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B) foo", "B"),
        ("B) Vitamin C", "B"),
        ("**B.** foo\nbecause A is false", "B"),
        ("The answer is B.", "B"),
        ("the answer is (b)", "B"),
        ("**Answer:** B", "B"),
        ("\\boxed{B}", "B"),
        ("The correct option is: B, as A fails.", "B"),
        ("It could be A. No: the answer is A... wait, the answer is B.", "B"),
        ("A is too small and C too large.\n\nB", "B"),
        ("I think a closer look favours B", "B"),
        ("A dog, so B", "B"),
        ("A or B", None),
        ("(A) is wrong, (B) is right", None),
        ("A) foo\nB) bar", None),
        ("I do not know", None),
        ("foo", None),
    ],
)
def test_the_letter_a_choice_settles_on(answer: str, letter: str | None) -> None:
    assert scoring.chosen_letter(answer) == letter


def test_a_choice_is_right_by_its_letter() -> None:
    assert measure(question("choice", "b"), GivenAnswer("The answer is B.")) == 1.0
    assert measure(question("choice", "A"), GivenAnswer("The answer is B.")) == 0.0


def test_code_that_passes_all_its_tests_is_right() -> None:
    assert measure(unit_tests(), GivenAnswer(CODE)) == 1.0


def test_the_block_that_defines_the_solution_is_run() -> None:
    assert measure(unit_tests(), GivenAnswer("```sh\npip install x\n```\n" + CODE)) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "def solution(x):\n    return 2",
        "def solution(x) return",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "solution = lambda x: open('/etc/passwd').read()",
        "\ud800",
        "\0",
        "(" * 50_000,
        "x" * 1_000_000,
    ],
    ids=["wrong", "syntax", "exit", "hard-exit", "escape", "surrogate", "nul", "deep", "huge"],
)
def test_code_that_does_not_reach_the_end_of_its_tests_is_wrong(code: str) -> None:
    assert measure(unit_tests(), GivenAnswer(code)) == 0.0


@pytest.mark.serial
async def test_hung_code_ends_at_the_time_limit_and_leaves_the_loop_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure(unit_tests(), GivenAnswer(CODE))  # starts the sandbox
    monkeypatch.setattr(scoring, "TESTS_TIMEOUT_S", 2.0)
    begin = time.monotonic()
    hung = asyncio.create_task(score(unit_tests(), GivenAnswer("import time\ntime.sleep(60)")))
    await asyncio.sleep(0.1)
    assert not hung.done()
    assert await hung == Scored(0.0)
    assert time.monotonic() - begin < 30


@pytest.mark.serial
def test_sandbox_that_hangs_fails_the_scoring_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    measure(unit_tests(), GivenAnswer(CODE))  # starts the sandbox
    monkeypatch.setattr(scoring, "TESTS_TIMEOUT_S", 0.5)
    pid = sandbox_server().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(ToolFailed, match="in time"):
        measure(unit_tests(), GivenAnswer(CODE))
    assert time.monotonic() - begin < 0.5 + GRACE_S + 3
    monkeypatch.setattr(scoring, "TESTS_TIMEOUT_S", 10.0)
    assert measure(unit_tests(), GivenAnswer(CODE)) == 1.0


async def test_programs_scored_together_do_not_use_up_each_others_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure(unit_tests(), GivenAnswer(CODE))  # starts the sandbox
    monkeypatch.setattr(scoring, "TESTS_TIMEOUT_S", 1.2)
    slow = unit_tests("import time", "time.sleep(0.5)")
    assert (
        await asyncio.gather(*(score(slow, GivenAnswer("x = 1")) for _ in range(3)))
        == [Scored(1.0)] * 3
    )


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"city": " Oslo ", "days": 3.0, "units": ["c", True]}, True),
        ({"city": "Oslo", "days": 4, "units": ["c", True]}, False),
        ({"city": "Oslo", "days": "3", "units": ["c", True]}, False),
        ({"city": "Oslo", "days": 3, "units": ["c", 1]}, False),
        ({"city": "Oslo", "days": 3, "units": ["c"]}, False),
        ({"city": "Oslo", "days": 3}, False),
    ],
)
def test_a_tool_call_is_compared_by_the_value_of_its_arguments(
    arguments: dict[str, Any], right: bool
) -> None:
    gold = {"name": "weather", "arguments": {"city": "Oslo", "days": 3, "units": ["c", True]}}
    answer = GivenAnswer(None, (call("weather", arguments),))
    assert measure(question("tool_call", gold), answer) == float(right)


def test_the_last_tool_call_counts() -> None:
    asked = question("tool_call", {"name": "weather", "arguments": {"city": "Oslo"}})
    right, wrong = call("weather", {"city": "Oslo"}), call("weather", {"city": "Rome"})
    assert measure(asked, GivenAnswer("", (wrong, right))) == 1.0
    assert measure(asked, GivenAnswer("", (right, wrong))) == 0.0
    assert measure(asked, GivenAnswer("weather in Oslo")) == 0.0
    assert measure(asked, GivenAnswer("", (call("search", {"city": "Oslo"}),))) == 0.0


TOKYO_AND_36 = Question.model_validate(
    {
        "id": "two",
        "query": "What is the capital of Japan, and what is 15% of 240?",
        "metric": "all_of",
        "gold": [{"metric": "normalised", "gold": "Tokyo"}, {"metric": "numeric", "gold": 36}],
    }
)


@pytest.mark.parametrize(
    "answer",
    [
        "Tokyo\n36",
        "Tokyo.\n\nThe answer is 36.",
        "tokyo\n36.0",
        "Tokyo, 36",
        "The capital of Japan is Tokyo, and 15% of 240 is 36.",
        "The capital of Japan is Tokyo.\n15% of 240 = 36",
        "It is Tokyo, and the second answer is 36.",
    ],
)
def test_an_answer_with_all_its_parts_is_right(answer: str) -> None:
    assert measure(TOKYO_AND_36, GivenAnswer(answer)) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "Tokyo",
        "36",
        "36\nTokyo",
        "Tokyo\n37",
        "Kyoto\n36",
        "Tokyo or Kyoto\n36",
        "Tokyo\n34, 35, 36",
        "Tokyo\n34\n35\n36",
        "Kyoto Tokyo Osaka 36",
        "Tokyo 34 35 36 37",
        "Tokyo is not the capital of Japan, and 15% of 240 is 36.",
        "The capital of Japan is Tokyo, and 15% of 240 is 36 or 35.",
        "Is it Tokyo? I think 36.",
    ],
)
def test_a_missing_part_or_several_candidates_make_an_answer_wrong(answer: str) -> None:
    assert measure(TOKYO_AND_36, GivenAnswer(answer)) == 0.0


def test_parts_of_one_sentence_stand_in_the_order_of_the_question() -> None:
    capitals = [{"metric": "normalised", "gold": gold} for gold in ("Paris", "Tokyo")]
    asked = question("all_of", capitals)
    assert measure(asked, GivenAnswer("Paris and Tokyo")) == 1.0
    assert measure(asked, GivenAnswer("Tokyo and Paris")) == 0.0


def test_a_gold_that_stands_in_the_question_must_have_its_own_line() -> None:
    parts = [{"metric": "numeric", "gold": 10}, {"metric": "normalised", "gold": "x"}]
    fields = {"id": "q", "query": "What is 5 + 5, not 10 + 1? And x?", "metric": "all_of"}
    asked = Question.model_validate({**fields, "gold": parts})
    assert measure(asked, GivenAnswer("What is 5 + 5, 10 + 1 and x")) == 0.0
    assert measure(asked, GivenAnswer("10\nx")) == 1.0


def test_a_block_of_code_is_one_part() -> None:
    code = {"metric": {"name": "unit_tests", "tests": TESTS}, "gold": None}
    asked = question("all_of", [code, {"metric": "numeric", "gold": 7}])
    block = "```python\ndef solution(x):\n\n    return x + 1\n```"
    assert measure(asked, GivenAnswer(f"{block}\n7")) == 1.0
    assert measure(asked, GivenAnswer(f"{block}\n8")) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "I don't know.",
        "I don\u2019t know",
        "Sorry, I do not know what it is.",
        "The sources do not say.",
        "The handbook does not say what it is.",
        "No information found",
        "unknown",
    ],
)
def test_an_answer_that_declines_is_a_refusal(answer: str) -> None:
    assert measure(question("refusal"), GivenAnswer(answer)) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "Paris",
        "I don't know, but it may be Paris.",
        "I don't know. 1766",
        "The sources do not say, so the answer is Paris.",
        "It is not known for Paris.",
        "Yes.",
        "1766",
    ],
)
def test_an_answer_that_also_claims_something_is_no_refusal(answer: str) -> None:
    assert measure(question("refusal"), GivenAnswer(answer)) == 0.0


@pytest.mark.parametrize(
    ("first", "second", "scored"),
    [
        ("Verdict: A", "Verdict: B", Scored(1.0, True)),
        ("Both hold.\n**Verdict:** tie", "verdict: a tie", Scored(1.0, True)),
        ("Verdict: A", "Verdict: tie", Scored(1.0, True)),
        ("B", "A.", Scored(0.0, True)),
        ("Verdict: A", "Verdict: A", Scored(0.5, False)),
        ("Verdict: A", "I cannot tell", Scored(0.5, False)),
        ("", "", Scored(0.5, False)),
    ],
)
async def test_a_judge_must_say_the_same_in_both_orders(
    first: str, second: str, scored: Scored
) -> None:
    judge = judge_saying(first, second)
    assert await score(question("judge", "gold"), GivenAnswer("given"), judge=judge) == scored


async def test_the_judge_sees_question_and_both_answers_in_both_orders() -> None:
    prompts = []

    async def judge(prompt: str) -> str:
        prompts.append(prompt)
        return "tie"

    await score(question("judge", "the gold"), GivenAnswer("the {answer}"), judge=judge)
    assert all("What is it?" in prompt for prompt in prompts)
    assert [p.index("the {answer}") < p.index("the gold") for p in prompts] == [True, False]


async def test_a_question_for_a_judge_is_refused_without_one() -> None:
    with pytest.raises(ConfigError, match="judge"):
        await score(question("judge", "gold"), GivenAnswer("given"))


EVERY_METRIC = [
    question("numeric", 1),
    question("exact", "x"),
    question("normalised", "the x"),
    question("f1", ["x", "y z"]),
    question("choice", "A"),
    question("tool_call", {"name": "f", "arguments": {"x": [1, {"y": 2.0}]}}),
    unit_tests(),
    question("judge", "gold"),
    question("all_of", [{"metric": "numeric", "gold": 1}, {"metric": "normalised", "gold": "x y"}]),
    question("refusal"),
]


@pytest.mark.parametrize("asked", EVERY_METRIC, ids=lambda asked: asked.metric.name)
@pytest.mark.parametrize("text", [None, "", " \n"], ids=repr)
async def test_no_answer_scores_nothing(asked: Question, text: str | None) -> None:
    assert (await score(asked, GivenAnswer(text), judge=judge_saying())).score == 0.0


PURE = [asked for asked in EVERY_METRIC if asked.metric.name not in ("unit_tests", "judge")]
FRAGMENTS = [
    "answer is ",
    "\\boxed{",
    "####",
    "=",
    "1,234.5",
    "-",
    "\u2212",
    ".5",
    "1e999",
    "x 10^",
]
FRAGMENTS += ["⁵", "B", "(a)", "nan", "inf", "the ", "\n", " ", "```", "\0", "\ud800", "٣", "I"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.parametrize("asked", PURE, ids=lambda asked: asked.metric.name)
@given(
    text=st.text() | st.lists(st.sampled_from(FRAGMENTS)).map("".join),
    arguments=st.dictionaries(st.sampled_from(["x", "y"]), JSON),
)
def test_any_answer_has_a_score(asked: Question, text: str, arguments: dict[str, Any]) -> None:
    assert 0 <= measure(asked, GivenAnswer(text, (call("f", arguments),))) <= 1


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=300)
def test_every_number_is_read_back(number: float) -> None:
    assert scoring.read_number(f"The answer is {number!r}.") == number


REPEATED = [
    "9",
    "1,",
    "1,111",
    "-",
    " ",
    "\n",
    "a ",
    "the ",
    "A\n",
    "answer ",
    "answer is ",
    "is B. ",
]
REPEATED += ["\\boxed{", "=", "```", "####", "(", "1 x 10", "٣", ".", "a1.", "\ufdfa"]


@pytest.mark.serial
@pytest.mark.parametrize("asked", PURE, ids=lambda asked: asked.metric.name)
@pytest.mark.parametrize("part", REPEATED, ids=repr)
def test_time_does_not_explode_with_the_length_of_an_answer(asked: Question, part: str) -> None:
    begin = time.thread_time()  # other work on the machine does not count
    measure(asked, GivenAnswer(part * (200_000 // len(part)) + "x"))
    assert time.thread_time() - begin < 3


def test_arguments_nested_without_bound_are_compared() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    gold = {"name": "f", "arguments": {"x": [[1]]}}
    answer = GivenAnswer(None, (call("f", {"x": nested}),))
    assert measure(question("tool_call", gold), answer) == 0.0
