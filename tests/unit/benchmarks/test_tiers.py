"""The pool on which further steps matter: its questions, its tools, and what is measured on it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.nano.__main__ import app
from benchmarks.nano.flaky import Flaky
from benchmarks.nano.tiers import COMPOSED, FOLDER, SHELVES, SOURCES, tiers_questions, write_shelves
from benchmarks.tiers import (
    Samples,
    expected_oracle,
    headroom,
    of_domains,
    one_step,
    perfect_cascade,
)
from rl.fit.dataset import Dataset
from rl.profile.outcomes import Outcomes
from serve_app.config import load_config
from serve_app.config.tools import CustomToolConfig
from serve_app.errors import ToolFailed
from serve_app.questions import read_questions
from serve_app.schemas import Pair
from serve_app.tools.builtin.custom import load_custom

CONFIG = Path("configs/nano-tiers.yaml")


def flaky(**settings: Any) -> Flaky:
    config = CustomToolConfig(
        type="custom",
        tool_id="calculator",
        description="",
        import_path="benchmarks.nano.flaky:Flaky",
        settings={"tool": {"type": "calculator"}, **settings},
    )
    tool = load_custom(config)
    assert isinstance(tool, Flaky)
    return tool


def test_every_domain_has_its_questions_and_none_is_asked_twice(tmp_path: Path) -> None:
    out = tmp_path / "questions.jsonl"
    arguments = ["tiers", str(out), "--train", "6", "--held-out", "4"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    questions = read_questions(out)
    domains = {*SOURCES, *COMPOSED}
    assert len(domains) == 13
    counted = Counter((of.domain, of.effective_split) for of in questions)
    assert counted == {(of, split): n for of in domains for split, n in SIZES.items()}
    assert len({of.query for of in questions}) == len({of.id for of in questions}) == 130


SIZES = {"train": 6, "held_out": 4}


def test_the_same_seed_gives_the_same_questions() -> None:
    drawn = [tiers_questions({"held_out": 3}, seed) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_shipped_shelves_are_those_that_are_written_and_miss_some_subjects(
    tmp_path: Path,
) -> None:
    write_shelves(tmp_path)
    titles = {}
    for shelf in SHELVES:
        text = (tmp_path / f"{shelf}.jsonl").read_text()
        assert text == (FOLDER / f"{shelf}.jsonl").read_text()
        titles[shelf] = {json.loads(line)["title"] for line in text.splitlines()}
    corpus = Path("configs/nano/corpus.jsonl").read_text().splitlines()
    everything = {json.loads(line)["title"] for line in corpus}
    assert titles["library"] | titles["archive"] == everything
    assert titles["library"] - titles["archive"]
    assert titles["archive"] - titles["library"]


def test_the_tiers_have_one_skill_at_three_prices() -> None:
    config = load_config(CONFIG)
    for skill in ("math", "facts", "code"):
        tiers = [config.model(f"nano-{skill}{tier}") for tier in ("-15", "-40", "")]
        prices = [of.price.usd_per_1m_completion_tokens for of in tiers]
        assert np.allclose(np.array(prices) / prices[0], [1, 3, 10])
        assert len({of.card.description for of in tiers}) == 1
    assert Pair.of_pattern("split-and-solve") in config.all_candidates()


def test_a_flaky_tool_fails_its_share_of_the_calls() -> None:
    never, always = flaky(fails=0.0), flaky(fails=1.0)
    assert never.functions() == always.functions()
    assert never.run({"expression": "6 * 7"}, 5.0).text == "42"
    with pytest.raises(ToolFailed, match="out of order"):
        always.run({"expression": "6 * 7"}, 5.0)


# What is measured: two candidates, of which the cheap one is right half of the time.

CHEAP, DEAR = 0.001, 0.01


def samples(scores: list[list[list[float]]], domains: list[str]) -> Samples:
    dense = np.array(scores)
    costs_usd = np.broadcast_to(np.array([CHEAP, DEAR]), dense.shape).copy()
    return Samples(dense, costs_usd, np.array(domains), np.zeros((len(domains), 4), np.float32))


@pytest.fixture
def held_out() -> Samples:
    return samples([[[1, 1], [0, 1]], [[0, 1], [1, 0]]], ["a", "b"])


def test_a_perfect_verifier_asks_on_only_where_the_answer_was_wrong(held_out: Samples) -> None:
    quality = np.array([[0.9, 0.8], [0.9, 0.8]])
    cascade = perfect_cascade(held_out, quality)
    assert cascade.scores[0].tolist() == [1.0, 1.0]
    assert cascade.steps[0].tolist() == [1.5, 1.5]
    assert cascade.costs_usd[0] == pytest.approx([CHEAP + DEAR / 2] * 2)
    assert cascade.steps[-1].tolist() == [1.0, 1.0]  # at alpha 0.9 nothing is worth a second price


def test_one_choice_is_judged_by_how_often_it_is_right(held_out: Samples) -> None:
    once = one_step(held_out, np.array([[0.9, 0.8], [0.1, 0.8]]))
    assert once.scores[0].tolist() == [0.5, 0.5]
    assert once.costs_usd[0] == pytest.approx([CHEAP, DEAR])


def test_the_oracle_in_expectation_does_not_see_the_run_it_is_judged_on(held_out: Samples) -> None:
    # On the second question each candidate was right in the other run, and wrong in this one.
    assert expected_oracle(held_out).scores[0].tolist() == [0.5, 0.0]


def test_the_best_of_a_domain_is_that_of_the_training_questions(held_out: Samples) -> None:
    ones = np.ones(3, np.float32)
    outcomes = Outcomes(
        encoder="x",
        embeddings=np.zeros((3, 4), np.float32),
        pairs=(Pair("cheap", "none"), Pair("dear", "none")),
        query_index=np.array([0, 1, 2]),
        pair_index=np.array([0, 1, 0]),
        score=np.array([1, 1, 0], np.float32),
        tokens=ones,
        seconds=ones,
        costs_usd=ones,
    )
    best = one_step(held_out, of_domains(held_out, Dataset(outcomes, ("a", "b", "b"))))
    assert best.costs_usd[0] == pytest.approx([CHEAP, DEAR])


def test_headroom_is_over_what_costs_no_more(held_out: Samples) -> None:
    quality = np.array([[0.9, 0.8], [0.9, 0.8]])
    cascade = perfect_cascade(held_out, quality)
    cheap, dear = one_step(held_out, quality), one_step(held_out, quality[:, ::-1])
    room = headroom(cascade, [cheap, dear])
    assert room["one_step_usd"] == pytest.approx(CHEAP)
    assert room["difference"] == pytest.approx(0.5)
    assert headroom(cheap, [dear])["difference"] <= 0.5
