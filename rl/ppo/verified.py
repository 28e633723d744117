"""What the verifier of a snapshot says of a table's answers, and how good that is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl.evaluate.verified import VerifierFigures, by_label, figures_of
from rl.ppo.table import ReplayTable
from rl.ppo.verifier import Fitted, signals_of_table, view_beliefs
from serve_app.router.policy.features import NO_ANSWER
from serve_app.router.policy.verifier import Answers, Verifier
from serve_app.router.snapshots.snapshot import VERIFIER, RouterSnapshot


@dataclass(frozen=True)
class Said:
    """Chances of the answers of a table, each asked for alone; n answers."""

    chance: NDArray[np.float64]
    score: NDArray[np.float64]
    query: NDArray[np.intp]
    pair: NDArray[np.intp]

    def figures(self, rows: NDArray[np.bool_] | None = None) -> VerifierFigures | None:
        """Of some of the answers; `None` takes all."""
        kept = np.ones(len(self.chance), np.bool_) if rows is None else rows
        return figures_of(self.chance[kept], self.score[kept], self.query[kept], self.pair[kept])


def said_of(table: ReplayTable, snapshot: RouterSnapshot) -> Said:
    """What a snapshot's verifier says of each answer of a table.

    Args:
        table: Its one view is what the snapshot's path 1 believes.
        snapshot: With a verifier.
    """
    verifier = Verifier(snapshot.verifier, len(snapshot.pairs))
    known = {pair: place for place, pair in enumerate(snapshot.pairs)}
    places = np.array([known.get(pair, -1) for pair in table.pairs], np.intp)
    beliefs, numbers = view_beliefs(table, table.views[0]), signals_of_table(table)
    query, pair = np.nonzero(table.answer_key[0] != NO_ANSWER)
    chance = np.empty(len(query))
    for number, (row, column) in enumerate(zip(query.tolist(), pair.tolist(), strict=True)):
        vector = table.answer_embeddings[table.answer_row[0, row, column]]
        if not table.answer_row[0, row, column]:
            vector = np.full_like(vector, np.nan)
        alone = Answers(
            beliefs=beliefs[row, [column]],
            numbers=numbers[row, [column]],
            keys=np.zeros(1, np.intp),
            voters=np.zeros(1, np.intp),
            vectors=vector[None],
            query=table.embeddings[row],
            pairs=places[[column]],
        )
        chance[number] = verifier.chances(alone)[0]
    return Said(chance, table.score[0, query, pair].astype(np.float64), query, pair)


def report_of(fitted: Fitted, domains: tuple[str, ...]) -> dict[str, Any]:
    """How good a fit is on questions, and on domains, that it did not see; plain values."""
    examples = fitted.examples
    rows = examples.is_alone & (examples.view == 0)
    folds = Said(
        fitted.chance[rows],
        examples.score[rows].astype(np.float64),
        examples.query[rows],
        examples.pair[rows],
    )
    rows = examples.is_alone & np.isfinite(fitted.left_out)
    outside = Said(
        fitted.left_out[rows],
        examples.score[rows].astype(np.float64),
        examples.query[rows],
        examples.pair[rows],
    )
    figures = folds.figures()
    left_out = by_label(np.array(domains)[outside.query], outside.figures)
    return {
        "new_questions": None if figures is None else asdict(figures),
        "left_out_domains": {name: asdict(of) for name, of in left_out.items()},
    }


def verifier_figures(table: ReplayTable, snapshot: RouterSnapshot) -> dict[str, VerifierFigures]:
    """How good a snapshot's verifier is: on a table, and as its fit says.

    Args:
        table: Of questions that it was not fitted on; as of `said_of`.
        snapshot: With a verifier.
    """
    figures: dict[str, VerifierFigures] = {}
    held_out = said_of(table, snapshot).figures()
    if held_out is not None:
        figures["held_out"] = held_out
    fitted = snapshot.metadata.get(VERIFIER) or {}
    if fitted.get("new_questions"):
        figures["new_questions"] = VerifierFigures(**fitted["new_questions"])
    for name, of in (fitted.get("left_out_domains") or {}).items():
        figures[f"without {name}"] = VerifierFigures(**of)
    return figures
