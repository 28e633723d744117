"""What the bundled pool knows and does not know, for the rule `scope` of `configs/nano.yaml`.

Into `configs/nano/scope/` go `known.txt`, utterances like the questions that the pool was profiled
on, and `fit.jsonl`, labelled texts for `atlas rules fit`. `outside.txt` and `outside-fit.txt` are
written by hand, as is `outside-held-out.jsonl`, which nothing is fitted on. The questions that ship
are not among them, nor are wordings that the nano models never saw (`held_out`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.nano.composed import composed_questions
from benchmarks.nano.labelled import question_set
from benchmarks.nano.registry import QUESTION_SETS

FOLDER = Path(__file__).parents[2] / "configs" / "nano" / "scope"
_SEED = 1_904


def known_texts(simple: int, composed: int, seed: int, without: Iterable[str] = ()) -> list[str]:
    """Questions in wordings that the nano models saw, each in one line.

    Args:
        simple: How many of one part, of each set.
        composed: How many that take several calls.
        seed: The same seed gives the same questions.
        without: Texts that are left out.
    """
    asked = [q.query for q in question_set(list(QUESTION_SETS), {"seen": simple}, seed)]
    asked += [q.query for q in composed_questions({"seen": composed}, seed)]
    left_out = set(without)
    return [text for text in dict.fromkeys(map(in_one_line, asked)) if text not in left_out]


def in_one_line(text: str) -> str:
    """A text without line breaks; the encoder does not see them."""
    return " ".join(text.split())


def write_scope(folder: Path = FOLDER) -> None:
    """Write `known.txt` and `fit.jsonl`."""
    shipped = [
        in_one_line(json.loads(line)["query"])
        for name in ("questions", "composed")
        for line in (folder.parent / f"{name}.jsonl").read_text().splitlines()
    ]
    known = known_texts(180, 100, _SEED, shipped)
    fit = known_texts(270, 150, _SEED + 1, [*shipped, *known])
    outside = (folder / "outside-fit.txt").read_text().splitlines()
    rows = [{"text": text, "label": "known"} for text in fit]
    rows += [{"text": text, "label": "outside"} for text in outside]
    (folder / "known.txt").write_text("".join(f"{text}\n" for text in known))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "fit.jsonl").write_text("".join(lines))
