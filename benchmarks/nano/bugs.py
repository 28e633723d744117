"""`configs/nano/bugs.jsonl`: bugs of small functions and how each was mended, to be looked up.

Each is made by putting a logic fault into a function of which training mends faulty ones; functions
that are held out are not in it. `similar` looks bugs up as the `retrieval` tool does, by words.
"""

from __future__ import annotations

import difflib
import json
import random
from functools import cache
from pathlib import Path

from benchmarks.nano.code_faults import Fault
from benchmarks.nano.code_repair import Repair, draw_repair, plain
from serve_app.config.tools import RetrievalConfig
from serve_app.tools.builtin.corpus import read_corpus
from serve_app.tools.builtin.retrieval import Index

BUGS_PATH = Path(__file__).parents[2] / "configs" / "nano" / "bugs.jsonl"

_LESSONS: dict[Fault, tuple[str, str]] = {
    "off_by_one": ("off by one", "A number is one too high or too low"),
    "operator": ("wrong operator", "The operator computes something else"),
    "comparison": ("wrong comparison", "The comparison is turned round or moves the border"),
    "return": ("lost result", "The result is computed but not returned"),
    "variable": ("wrong variable", "Another variable is meant"),
    "call": ("wrong function", "The function that is called does something else"),
}
"""Title of a family, and what is wrong in it."""
_MAX_LINE_CHARS = 120
_CONFIG = RetrievalConfig(tool_id="bugs", corpus=BUGS_PATH, encoder=None, top_k=1)


def bug_entries(count: int, seed: int) -> list[dict[str, str]]:
    """Entries of the corpus: `id`, `title` and `text`; no text occurs twice.

    Args:
        count: How many.
        seed: The same seed gives the same entries.
    """
    rng = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        repair = draw_repair(rng, "seen", "logic")
        lines = changed_line(repair)
        if lines is None:
            continue
        title, lesson = _LESSONS[repair.fault]
        text = f"{lesson}: `{lines[0]}` has to be `{lines[1]}`."
        entry_id = f"{repair.function}-{len(found) + 1:04d}"
        found.setdefault(text, {"id": entry_id, "title": title, "text": text})
    return list(found.values())


def changed_line(repair: Repair) -> tuple[str, str] | None:
    """The line of a fault, wrong and right; `None`: it is more than a short line."""
    wrong, right = repair.code.split("\n"), plain(repair.answer).split("\n")
    changes = [
        (wrong[a:b], right[c:d])
        for tag, a, b, c, d in difflib.SequenceMatcher(None, wrong, right, False).get_opcodes()
        if tag != "equal"
    ]
    if len(changes) != 1 or [len(part) for part in changes[0]] != [1, 1]:
        return None
    (first,), (second,) = changes[0]
    if max(len(first), len(second)) > _MAX_LINE_CHARS:
        return None
    return first.strip(), second.strip()


def similar(repair: Repair, *, knows_function: bool) -> str:
    """What the pattern's look-up gives for a fault.

    Args:
        repair: The fault.
        knows_function: Whether bugs of the same function count; a new function has none.
    """
    own = f"{repair.function}-"
    found = _index().search(repair.code, None, _CONFIG.model_copy(update={"top_k": 20}))
    for sentence, _, _ in found:
        if (
            knows_function
            or repair.function == "composed"
            or not sentence.source_id.startswith(own)
        ):
            return f"[1] {sentence.text}"
    return ""


@cache
def _index() -> Index:
    return Index(read_corpus(_CONFIG), None)


def write_bugs(path: Path, count: int, seed: int) -> None:
    """Write the corpus."""
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in bug_entries(count, seed))
    path.write_text("".join(lines), encoding="utf-8")
