"""Has the same request the same result, on another day and another replica, whatever was learned?

How to run: `python -m benchmarks.repeat --out FILE.json [--requests N]`. It serves the nano pool,
asks held-out questions with `atlas.deterministic`, rates 50 ordinary answers against what the
router believes, ends the graph, serves it again with two gateways and two routers, and asks the
same questions again, in another order and so in other batches.

Wanted: the same candidate always. The same text is only reported: the engine's sums depend on what
else is in its batch. See `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import openai
import yaml
from rich.console import Console

from benchmarks.patterns import CONFIG, question_sets, served
from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target

REQUESTS = 200
VERDICTS = 50
_AT_ONCE = 8
_SETS = ("math", "facts", "code", "database", "clock", "compound", "hops", "repair")

console = Console()


@dataclass(frozen=True, slots=True)
class Result:
    """What one request came to."""

    candidate: str
    path: str
    policy_version: int
    text: str


def questions(count: int) -> list[str]:
    """Held-out questions of every kind in turn; fewer where there are fewer."""
    sets = question_sets(count)
    turns = zip_longest(*(sets[name] for name in _SETS))
    return [question.query for question in chain(*turns) if question][:count]


async def ask(url: str, asked: Sequence[str], options: dict[str, Any]) -> list[Result | None]:
    """Ask every question once; `None` where a request failed.

    Args:
        url: Where the graph answers.
        asked: What is asked.
        options: The requests' `atlas` object; with `score`, that rates each answer.
    """
    score = options.pop("score", None)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(question: str) -> Result | None:
        async with gate:
            try:
                completion = await client.chat.completions.create(
                    model="atlas",
                    messages=[{"role": "user", "content": question}],
                    extra_body={"atlas": options},
                )
                about: dict[str, Any] = (completion.model_extra or {})["atlas"]
                if score is not None:
                    verdict = {"request_id": about["request_id"], "score": score}
                    await client.post("/feedback", cast_to=object, body=verdict)
            except openai.APIError:
                return None
            text = completion.choices[0].message.content or ""
            return Result(about["pair"], about["path"], about["policy_version"], text)

    found = await asyncio.gather(*map(one, asked))
    await client.close()
    return list(found)


def wait_for_pairs(url: str) -> None:
    """Return when every pair is ready: one that is not is no candidate.

    Raises:
        TimeoutError: If one is not after two minutes.
    """
    client, ends_s = openai.OpenAI(base_url=f"{url}/v1", api_key="none"), time.monotonic() + 120
    while True:
        about = [(model.model_extra or {})["atlas"] for model in client.models.list()]
        waiting = [of for of in about if of["kind"] == "pair" and of["state"] != "ready"]
        if not waiting:
            return
        if time.monotonic() > ends_s:
            raise TimeoutError(f"{len(waiting)} pairs are not ready")
        time.sleep(1.0)


def write_config(folder: Path, replicas: int) -> Path:
    """The nano pool with so many gateways and routers."""
    config = yaml.safe_load(CONFIG.read_text().replace("./", f"{CONFIG.parent}/"))
    bounds = {"autoscaling": {"min_replicas": replicas, "max_replicas": replicas}}
    for deployment in ("gateway", "router"):
        config[deployment] = config.get(deployment, {}) | {"deployment": bounds}
    path = folder / f"nano-{replicas}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def share(values: Sequence[bool]) -> float:
    """The share that is true."""
    return sum(values) / len(values)


def main() -> None:
    """Ask, learn, start again, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="at most")
    args = parser.parse_args()
    asked = questions(args.requests)
    same = {"deterministic": True}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with served(None, write_config(folder, 1), folder / "data") as url:
            wait_for_pairs(url)
            console.print(f"{len(asked)} questions, one gateway and one router")
            first = asyncio.run(ask(url, asked, dict(same)))
            rated = asyncio.run(ask(url, asked[:VERDICTS], {"score": 0.0}))
            console.print(f"{VERDICTS} answers rated as useless")
        with served(None, write_config(folder, 2), folder / "data") as url:
            wait_for_pairs(url)
            console.print("the same again after a restart, two gateways and two routers")
            again = asyncio.run(ask(url, asked[::-1], dict(same)))[::-1]
            plain = asyncio.run(ask(url, asked[:VERDICTS], {}))
    both = [(one, two) for one, two in zip(first, again, strict=True) if one and two]
    learned = [(one, two) for one, two in zip(rated, plain, strict=True) if one and two]
    targets = [
        Target("requests answered twice", float(len(both)), ">=", float(len(asked))),
        Target("the same candidate", share([a.candidate == b.candidate for a, b in both]), ">=", 1),
        Target("the same path", share([a.path == b.path for a, b in both]), ">=", 1),
        Target("verdicts that count", float(len(learned)), ">=", float(VERDICTS)),
    ]
    reported = {
        "the same text": share([a.text == b.text for a, b in both]),
        "the same candidate without `deterministic`, after the verdicts": share(
            [a.candidate == b.candidate for a, b in learned]
        ),
    }
    show_targets(targets)
    for what, value in reported.items():
        console.print(f"{what}: {value:.3f}")
    record = {
        "machine": {name: of for name, of in machine().items() if name != "serve_environment"},
        "reported": reported,
        "other_texts": [
            {"question": question, "first": asdict(a), "again": asdict(b)}
            for question, a, b in zip(asked, first, again, strict=True)
            if a and b and a != b
        ],
        "targets": [target.as_json() for target in targets],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
