"""The shipped patterns for pictures are wired: the real engine, a scripted model."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.config import load_config
from serve_app.config.abilities import abilities_of
from serve_app.schemas import Pair
from tests.pattern_fakes import PatternBench
from tests.pictures import asking, part

ROOT = Path(__file__).parents[3]
VISUAL = sorted((ROOT / "configs/patterns/visual").glob("*.yaml"))
EYE = "qwen3-vl-8b-instruct"
PICTURE = part()


@pytest.mark.parametrize("path", VISUAL, ids=lambda path: path.stem)
async def test_a_picture_is_read_first_and_answered_by_what_was_read(
    tmp_path: Path, path: Path
) -> None:
    said = iter(["This is what it shows.", "42"])
    bench = PatternBench(
        tmp_path, path.read_text().replace(EYE, "small"), says={"small": lambda _: next(said)}
    )
    answer = await bench.ask(messages=(asking(PICTURE, text="How many?"),))
    read, answered = (body["messages"][-1]["content"] for body in bench.engines.asked("small"))
    assert answer == "42"
    assert (read[1], answered[1]) == (PICTURE, PICTURE)
    assert "This is what it shows." in answered[0]["text"]
    assert "How many?" in answered[0]["text"]


def test_in_the_gpu_pool_pictures_go_to_the_model_that_sees_and_its_patterns() -> None:
    abilities = abilities_of(load_config(ROOT / "configs/gpu-7b.yaml"))
    seeing = {pair for pair, able in abilities.items() if able.vision}
    patterns = {Pair.of_pattern(path.stem) for path in VISUAL}
    assert {pair for pair in seeing if pair.is_pattern} == patterns
    assert {pair.model_id for pair in seeing - patterns} == {EYE}
