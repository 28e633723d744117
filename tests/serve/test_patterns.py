"""The shipped patterns of the nano pool, through the OpenAI client, on real engines and tools."""

from __future__ import annotations

import re
from typing import Any

import openai
import pytest

from tests.conftest import Graph

pytestmark = pytest.mark.serve


IN_CORPUS = "Which architect designed the Tabin Tower?"
"""The corpus says: Ida Bujor."""


@pytest.fixture(scope="module")
def client(graph: Graph) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{graph.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, pattern: str, question: str) -> tuple[str, dict[str, Any]]:
    completion = client.chat.completions.create(
        model=f"pattern:{pattern}",
        messages=[{"role": "user", "content": question}],
        temperature=0,
    )
    extension: dict[str, Any] = (completion.model_extra or {})["atlas"]
    return completion.choices[0].message.content or "", extension


def test_what_the_corpus_says_is_answered_with_its_source(client: openai.OpenAI) -> None:
    answer, extension = ask(client, "look-up-or-refuse", IN_CORPUS)
    (source, *_) = extension["sources"]
    assert answer.strip(". ") in source["text"]


def test_what_the_corpus_does_not_say_is_refused(client: openai.OpenAI) -> None:
    answer, extension = ask(client, "look-up-or-refuse", "Who designed the Zorgalin Tower?")
    assert answer.startswith("I don't know")
    assert "partial" not in extension


def test_a_fact_that_the_model_knows_is_not_looked_up(client: openai.OpenAI) -> None:
    answer, known = ask(client, "cheap-first", "What is the capital of Japan?")
    _, unknown = ask(client, "cheap-first", IN_CORPUS)
    assert answer == "Tokyo"
    assert known["cost_usd"] < unknown["cost_usd"]


def test_three_voices_agree_on_a_sum(client: openai.OpenAI) -> None:
    answer, _ = ask(client, "ask-three", "What is 15% of 240?")
    assert "36" in answer


def test_figures_of_one_list_come_line_by_line(client: openai.OpenAI) -> None:
    answer, extension = ask(client, "check-ten", "[4, 8, 15, 16, 23, 42]")
    assert len(answer.splitlines()) >= 8
    assert {"4", "6", "18", "23", "42", "108"} & set(re.findall(r"\d+", answer))
    assert extension["usage"]["completion_tokens"] > 0


def test_two_questions_at_once_are_split_and_both_answered(client: openai.OpenAI) -> None:
    question = "What is the capital of Japan, and what is 15% of 240?"
    answer, extension = ask(client, "split-and-solve", question)
    assert "Tokyo" in answer
    assert "36" in answer
    assert extension["stop"] == "answered"


def test_code_that_fails_its_example_is_mended(client: openai.OpenAI) -> None:
    faulty = "```python\ndef solution(a, b):\n    return sorted(b) == sorted(b)\n```"
    report = "solution('whale', 'committee') returns True, expected False."
    answer, _ = ask(client, "write-and-test", f"Fix this function.\n\n{faulty}\n\n{report}")
    (code,) = re.findall(r"```python\n(.*?)```", answer, re.S)
    space: dict[str, Any] = {}
    exec(compile(code, "answer", "exec"), space)
    assert space["solution"]("whale", "committee") is False
    assert space["solution"]("listen", "silent") is True


def test_the_worst_case_of_each_shipped_pattern_covers_what_it_used(
    client: openai.OpenAI,
) -> None:
    listed: Any = client.get("/admin/patterns", cast_to=object)
    worst = {row["name"]: row["worst_case"] for row in listed["data"]}
    _, extension = ask(client, "ask-three", "What is 15% of 240?")
    assert extension["usage"]["total_tokens"] <= worst["ask-three"]["tokens"]
    assert extension["cost_usd"] <= worst["ask-three"]["usd"]


def names(span: dict[str, Any]) -> list[str]:
    return [span["name"], *(name for child in span["children"] for name in names(child))]


def test_the_owner_reads_what_a_pattern_did(client: openai.OpenAI) -> None:
    _, extension = ask(client, "look-up-or-refuse", IN_CORPUS)
    found: Any = client.get(f"/trajectories/{extension['request_id']}", cast_to=object)
    told = names(found["trace"])
    for name in ("pattern:look-up-or-refuse", "retrieve found", "ask answer", "nano-facts@none"):
        assert name in told
    assert found["stop"] == "answered"
