"""Is a running graph's routing better than any single pair, at no higher cost than the best one?

Sends labelled questions to `atlas` and, with `--pairs`, to every pair; scores the answers as a
profile does. Run it before and after `atlas promote`: both runs are kept side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.stats import Target
from serve_app.questions import Question, read_questions
from serve_app.scoring import GivenAnswer, score

ROUTED = "atlas"
_AT_ONCE = 8


@dataclass
class Result:
    """What one model name reached on the questions."""

    name: str
    accuracy: float
    mean_cost_usd: float
    mean_seconds: float
    failed: int
    pairs: dict[str, int]
    """How many questions each pair answered."""
    policies: list[int]
    """Policy versions that decided."""


async def ask_each(
    url: str,
    model: str,
    questions: Sequence[Question],
    options: dict[str, Any] | None = None,
    *,
    temperature: float = 0.0,
) -> list[tuple[float, dict[str, Any]]]:
    """Ask every question once; its score, and the answer's `atlas` object.

    A request that fails scores 0, with an empty object.

    Args:
        url: Where the graph answers.
        model: Who is asked.
        questions: What is asked.
        options: The request's `atlas` object.
        temperature: Of the answers; 0 is greedy.
    """
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def ask(question: Question) -> tuple[float, dict[str, Any]]:
        async with gate:
            try:
                completion = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": question.query}],
                    temperature=temperature,
                    extra_body={"atlas": options} if options else None,
                )
            except openai.APIError:
                return 0.0, {}
            text = completion.choices[0].message.content
            scored = await score(question, GivenAnswer(text))
            extension: dict[str, Any] = (completion.model_extra or {})["atlas"]
            return scored.score, extension

    answers = await asyncio.gather(*(ask(question) for question in questions))
    await client.close()
    return answers


async def run(url: str, model: str, questions: Sequence[Question]) -> Result:
    """Ask every question once, and sum up."""
    answers = await ask_each(url, model, questions)
    seen = [extension for _, extension in answers if extension]
    pairs: dict[str, int] = {}
    for extension in seen:
        pairs[extension["pair"]] = pairs.get(extension["pair"], 0) + 1
    return Result(
        name=model,
        accuracy=sum(value for value, _ in answers) / len(answers),
        mean_cost_usd=sum(extension["cost_usd"] for extension in seen) / max(len(seen), 1),
        mean_seconds=sum(extension["seconds"] for extension in seen) / max(len(seen), 1),
        failed=len(answers) - len(seen),
        pairs=dict(sorted(pairs.items(), key=lambda entry: -entry[1])),
        policies=sorted({extension["policy_version"] for extension in seen}),
    )


def names_of_pairs(url: str) -> list[str]:
    """Every ready pair of the graph."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    described = [(model.id, (model.model_extra or {})["atlas"]) for model in client.models.list()]
    return [
        name for name, about in described if (about["kind"], about["state"]) == ("pair", "ready")
    ]


def targets(results: list[Result]) -> list[Target]:
    """Routed above every single pair, and no dearer than the best of them."""
    routed = [result for result in results if result.name == ROUTED][-1]
    singles = [result for result in results if result.name != ROUTED]
    if not singles:
        return []
    best = max(singles, key=lambda result: (result.accuracy, -result.mean_cost_usd))
    return [
        Target("accuracy over the best single pair", routed.accuracy - best.accuracy, ">=", 0.0),
        Target("cost over the best pair's", routed.mean_cost_usd / best.mean_cost_usd, "<=", 1.0),
        Target("failed requests", float(routed.failed), "<=", 0.0),
    ]


def main() -> None:
    """Ask, print, and add to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=Path, required=True, help="labelled questions")
    parser.add_argument("--out", type=Path, required=True, help="JSON; earlier runs in it stay")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pairs", action="store_true", help="ask every single pair too")
    chosen = parser.parse_args()
    questions = list(read_questions(chosen.questions))
    earlier = json.loads(chosen.out.read_text())["results"] if chosen.out.exists() else []
    results = [Result(**entry) for entry in earlier]
    names = [ROUTED, *(names_of_pairs(chosen.url) if chosen.pairs else [])]
    for name in track(names, f"{len(questions)} questions each"):
        results.append(asyncio.run(run(chosen.url, name, questions)))
    table = Table("", "right", "$ per 1000", "seconds", "failed", "policy", "mostly at")
    for result in results:
        table.add_row(
            result.name,
            f"{result.accuracy:.1%}",
            f"{1000 * result.mean_cost_usd:.5f}",
            f"{result.mean_seconds:.2f}",
            str(result.failed),
            ", ".join(map(str, result.policies)) if result.name == ROUTED else "",
            ", ".join(f"{pair} {n}" for pair, n in list(result.pairs.items())[:3])
            if result.name == ROUTED
            else "",
        )
    console = Console(width=130)
    console.print(table)
    judged = targets(results)
    for target in judged:
        word = "[green]holds[/green]" if target.holds else "[red]missed[/red]"
        console.print(f"{target.name}: {target.value:.3f} {target.relation} {target.target} {word}")
    record = {
        "num_questions": len(questions),
        "results": [vars(result) for result in results],
        "targets": [target.as_json() for target in judged],
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
