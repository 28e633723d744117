"""Many episodes side by side, stepped in numpy: what the environments of `rl.ppo.env` are made of.

`reset` starts episodes, `observe` gives what the network reads of all of them, `step` acts in all
of them. Nothing loops over episodes in Python. Columns are the table's own pairs, not padded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rl.ppo.backend import Backend, ReplayBackend
from rl.ppo.judges import Held
from rl.ppo.randomise import Draws, EnvSettings
from rl.ppo.reward import RewardTerms, charge, end_terms
from rl.ppo.table import ReplayTable, View
from rl.ppo.verifier import view_beliefs
from serve_app.errors import ConfigError
from serve_app.router.policy.features import (
    MAX_STEPS,
    NO_ANSWER,
    States,
    answer_action,
    best_answers,
    encode,
    legal_actions,
    think_action,
    voices,
)
from serve_app.router.policy.worth import expected_rises
from serve_app.router.rules.gate import settle_rows
from serve_app.router.rules.utility import cost_range
from serve_app.signals import NUMBERS

__all__ = ["EnvSettings", "Episodes", "Stepped"]

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.intp]


class Stepped(NamedTuple):
    """What one step of all episodes did; B episodes."""

    reward: Float
    """(B,) the sum of the terms."""
    done: Bool
    """(B,) ended at this step; such a row waits for its `reset`."""
    info: dict[str, NDArray[Any]]
    """(B,) each. Of this step: `r_out`, `r_fmt`, `r_sel` and `r_cost`, which sum to the reward. Of
    the episode so far: `total_cost` (the sum of `r_cost`, negated), `cost_usd`, `steps`. Where
    `done`: `score` of the returned answer and its `pair`, 0 and -1 without one. Of the episode:
    `query`, `alpha`, `view`."""


class Episodes:
    """B episodes over one backend.

    Invariants:
        - A row that ended does nothing until it is reset: its actions are ignored, its reward is 0.
        - `states` is what `features.encode` reads, kept in place; `observe` returns copies.
    """

    def __init__(
        self, backend: Backend | ReplayTable, num_envs: int, settings: EnvSettings | None = None
    ) -> None:
        """Lay out the rows; `reset` starts them.

        Args:
            backend: What runs the pairs; a table is replayed.
            num_envs: B.
            settings: What episodes are like.

        Raises:
            ConfigError: If the table has no view, or nothing can be run.
            ValueError: If there are not as many view weights as views.
        """
        self.backend = ReplayBackend(backend) if isinstance(backend, ReplayTable) else backend
        self.settings = settings or EnvSettings()
        self.num_envs = num_envs
        table = self.table = self.backend.table
        self.num_pairs = table.num_pairs
        self._usable = np.flatnonzero(self.backend.can_run.any(axis=1))
        if not table.views:
            raise ConfigError("the table has no view: path 1's beliefs are part of the state")
        if not len(self._usable):
            raise ConfigError("there is no query of the table that a pair can run on")
        self._draws = Draws(self.settings, table.pairs, len(table.views))
        self._beliefs = {
            name: np.stack([getattr(view, name) for view in table.views]).astype(np.float32)
            for name in ("quality", "spread", "overall", "distance_quantile", "confidence")
        }
        self._inside = np.stack([view.inside for view in table.views])
        self._outside = np.stack([view.outside for view in table.views]).astype(np.float32)
        self._voters = table.voter_of(np.arange(table.num_pairs))
        self._outlooks = None if table.judges is None else table.judges.outlooks()
        if table.judges is not None:
            self._believed = np.stack([view_beliefs(table, view) for view in table.views])
        self._typical_think_usd = float(table.think_cost_usd.mean())
        self._best = np.where(table.measured, table.score, -np.inf)
        dim = table.embeddings.shape[1]
        self.states = _empty_states(num_envs, dim, table)
        self.query = np.zeros(num_envs, np.intp)
        """(B,) row of the table that each episode is about."""
        self.view = np.zeros(num_envs, np.intp)
        """(B,) view of the table that each episode is seen by."""
        self.active = np.zeros(num_envs, np.bool_)
        """(B,) started, and not ended yet."""
        self._rows = np.arange(num_envs)
        self._factors = np.ones((num_envs, self.num_pairs), np.float32)
        # (B, MAX_STEPS): the answers in the order they came, who gave them, and how good they are.
        self._keys = np.full((num_envs, MAX_STEPS), NO_ANSWER, np.intp)
        self._step_pair = np.full((num_envs, MAX_STEPS), -1, np.intp)
        self._step_score = np.zeros((num_envs, MAX_STEPS), np.float32)
        self._step_chance = np.full((num_envs, MAX_STEPS), np.nan, np.float32)
        judged = 0 if table.judges is None else num_envs
        self._step_numbers = np.full((judged, MAX_STEPS, len(NUMBERS)), np.nan, np.float32)
        self._step_vector = np.full((judged, MAX_STEPS, dim), np.nan, np.float32)
        self._pair_keys = np.full((num_envs, self.num_pairs), NO_ANSWER, np.intp)
        self._num_steps = np.zeros(num_envs, np.intp)
        self._expected_usd = np.zeros(num_envs, np.float32)
        self._charged = np.zeros(num_envs, np.float32)
        self._legal: Bool | None = None

    def seed(self, seed: int) -> None:
        """Start the draws anew."""
        self._draws.seed(seed)

    def reset(
        self,
        rows: Index | None = None,
        *,
        queries: Index | None = None,
        alpha: Float | float | None = None,
        max_steps: Index | int | None = None,
        view: Index | int | None = None,
        usd_left: Float | float | None = None,
        seconds_left: Float | float | None = None,
    ) -> None:
        """Start episodes.

        Args:
            rows: (n,) which; `None` starts all.
            queries: (n,) rows of the table; `None` draws them.
            alpha: In [0, 1]; `None` draws it.
            max_steps: From 1 to `MAX_STEPS`; `None` draws it.
            view: Index of the table's view; `None` draws it.
            usd_left: Limit in dollars, inf without one; `None` draws it.
            seconds_left: Limit in seconds, inf without one; `None` draws it.

        Raises:
            ConfigError: If no pair can run on a query.
        """
        rows = np.arange(self.num_envs) if rows is None else np.asarray(rows, np.intp)
        size = len(rows)
        if not size:
            return
        draws, states, table = self._draws, self.states, self.table
        if queries is None:
            queries = draws.queries(self._usable, size)
        can_run = self.backend.can_run[queries]
        if not can_run.any(axis=1).all():
            raise ConfigError("no pair can run on one of the queries that were asked for")
        self.backend.start(rows, queries)
        present, factors = draws.pool(can_run)
        costs_usd = table.pair_costs_usd * factors
        states.embedding[rows] = table.embeddings[queries]
        states.alpha[rows] = draws.alpha(size) if alpha is None else alpha
        states.steps_left[rows] = draws.max_steps(size) if max_steps is None else max_steps
        most_usd, most_seconds = draws.limits(costs_usd, table.pair_seconds, present)
        states.usd_left[rows] = most_usd if usd_left is None else usd_left
        states.seconds_left[rows] = most_seconds if seconds_left is None else seconds_left
        states.can_think[rows] = self.backend.can_think[queries] & draws.has_planner(size)
        states.thought[rows] = False
        states.present[rows] = present
        states.costs_usd[rows] = costs_usd
        states.log_cost_range[rows] = cost_range(costs_usd, present)
        states.similarity[rows] = table.similarity[queries]
        self.view[rows] = draws.view(size) if view is None else view
        for name, beliefs in self._beliefs.items():
            getattr(states, name)[rows] = beliefs[self.view[rows], queries]
        outside = self._outside[self.view[rows], queries]
        for view_of_new, is_new in zip(
            (table.new_models, table.new_tools), draws.newcomers(size), strict=True
        ):
            if view_of_new is not None:
                self._forget(rows, queries, is_new, view_of_new)
                outside = np.where(is_new, view_of_new.outside[queries], outside)
        settled = settle_rows(
            states.quality[rows],
            states.spread[rows],
            states.overall[rows],
            present,
            table.caution,
        )
        inside = self._inside[self.view[rows], queries]
        states.decided[rows] = np.where(inside[:, None], settled, outside)
        states.chance[rows] = np.nan
        for name in ("tried", "failed", "logprob", "tool_errors", "agreement", "spent_usd"):
            getattr(states, name)[rows] = 0
        states.last[rows] = -1
        states.last_answer[rows] = 0
        self.query[rows] = queries
        self.active[rows] = True
        self._factors[rows] = factors
        self._keys[rows] = self._pair_keys[rows] = NO_ANSWER
        self._step_chance[rows] = np.nan
        self._num_steps[rows] = 0
        self._expected_usd[rows] = self._charged[rows] = 0
        self._look_ahead(rows)
        self._legal = None

    def observe(self) -> dict[str, Float]:
        """What `features.encode` gives of all episodes, P pairs wide; the arrays are new ones."""
        observation = encode(self.states)
        for name in ("query", "answer"):
            observation[name] = observation[name].copy()
        return observation

    def legal(self) -> Bool:
        """(B, P + 2) what may be done next; not to be written to."""
        legal = self._legal
        if legal is None:
            legal = self._legal = legal_actions(self.states)
        return legal

    def step(self, actions: NDArray[np.integer]) -> Stepped:
        """Act in all episodes that have not ended.

        Args:
            actions: (B,) a column of the table to route to, P to think, P + 1 to answer; anything
                else is illegal.
        """
        within = (actions >= 0) & (actions <= answer_action(self.num_pairs))
        chosen = np.where(within, actions, 0).astype(np.intp)
        allowed = within & self.legal()[self._rows, chosen]
        active = self.active
        illegal = active & ~allowed
        going = active & allowed
        routed = np.flatnonzero(going & (chosen < self.num_pairs))
        thinking = np.flatnonzero(going & (chosen == think_action(self.num_pairs)))
        if len(routed):
            self._route(routed, chosen[routed])
        if len(thinking):
            self._think(thinking)
        done = illegal | (going & (chosen == answer_action(self.num_pairs)))
        if len(routed) or len(thinking):
            self._legal = legal_actions(self.states)
            # With nothing left but to answer there is nothing to decide.
            done |= going & ~self._legal[:, : self.num_pairs].any(axis=1)
        terms, score, pair = self._settle(done, illegal)
        self.active = active & ~done
        info: dict[str, NDArray[Any]] = {
            "r_out": terms.out,
            "r_fmt": terms.fmt,
            "r_sel": terms.sel,
            "r_cost": terms.cost,
            "total_cost": self._charged.copy(),
            "cost_usd": self.states.spent_usd.copy(),
            "steps": self._num_steps.copy(),
            "score": score,
            "pair": pair,
            "query": self.query.copy(),
            "alpha": self.states.alpha.copy(),
            "view": self.view.copy(),
        }
        return Stepped(terms.total(), done, info)

    def _forget(self, rows: Index, queries: Index, is_new: Bool, view: View) -> None:
        """Let path 1 know some pairs of some episodes by their cards alone."""
        place, pair = np.nonzero(is_new)
        for name in ("quality", "spread", "overall"):
            getattr(self.states, name)[rows[place], pair] = getattr(view, name)[
                queries[place], pair
            ]

    def _route(self, rows: Index, pairs: Index) -> None:
        """Run a pair in each of some episodes, and keep what it showed."""
        states = self.states
        batch = self.backend.run(rows, self.query[rows], pairs, states.thought[rows])
        self._pay(rows, batch.cost_usd * self._factors[rows, pairs], batch.seconds)
        self._expected_usd[rows] += states.costs_usd[rows, pairs]
        states.tried[rows, pairs] = True
        states.failed[rows, pairs] = batch.answer_key == NO_ANSWER
        states.logprob[rows, pairs] = batch.logprob
        states.tool_errors[rows, pairs] = batch.tool_errors
        states.last[rows] = pairs
        states.last_answer[rows] = batch.answer_embedding
        place = (rows, self._num_steps[rows])
        self._keys[place] = batch.answer_key
        self._step_pair[place] = pairs
        self._step_score[place] = batch.score
        if self.table.judges is not None:
            self._step_numbers[place] = batch.signals
            is_known = (batch.answer_embedding != 0).any(axis=1, keepdims=True)
            self._step_vector[place] = np.where(is_known, batch.answer_embedding, np.nan)
        self._num_steps[rows] += 1
        self._pair_keys[rows, pairs] = batch.answer_key
        keys, own = self._keys[rows,], self._pair_keys[rows]
        counts = voices(keys, self.table.voter_of(self._step_pair[rows,]))
        agreeing = ((own[:, :, None] == keys[:, None, :]) * counts[:, None, :]).sum(axis=2)
        states.agreement[rows] = agreeing / np.maximum(counts.sum(axis=1), 1)[:, None]
        self._judge(rows)
        self._look_ahead(rows)

    def _judge(self, rows: Index) -> None:
        """Say of some episodes how likely each answer that they hold is right."""
        states, judges = self.states, self.table.judges
        if judges is None:
            answered = states.tried[rows] & ~states.failed[rows]
            states.chance[rows] = np.where(answered, states.decided[rows], np.nan)
            return
        place = (self.view[rows], self.query[rows])
        pairs = self._step_pair[rows]
        held = Held(
            beliefs=self._believed[place],
            numbers=self._step_numbers[rows],
            keys=self._keys[rows],
            pairs=pairs,
            voters=self.table.voter_of(pairs),
            vectors=self._step_vector[rows],
            query=states.embedding[rows],
        )
        chances = judges.chances(judges.of[place], held)
        self._step_chance[rows] = chances
        row, step = np.nonzero(np.isfinite(chances))
        states.chance[rows[row], pairs[row, step]] = chances[row, step]

    def _look_ahead(self, rows: Index) -> None:
        """Say of some episodes what each pair's run is expected to bring."""
        states, judges, outlook = self.states, self.table.judges, None
        if judges is not None and self._outlooks is not None:
            outlook = self._outlooks[judges.of[self.view[rows], self.query[rows]]]
        states.rise[rows] = expected_rises(
            states.decided[rows], states.chance[rows], self._voters, outlook
        )

    def _returned(self, rows: Index) -> Index:
        """(n,) the step whose answer each episode returns; `NO_ANSWER` for none.

        The likeliest one, the last of equals; where nothing judges, the one that most agree on.
        """
        if self.table.judges is None:
            return best_answers(self._keys[rows], self.table.voter_of(self._step_pair[rows]))
        chances = np.where(np.isfinite(self._step_chance[rows]), self._step_chance[rows], -1.0)
        last = chances.shape[1] - 1 - chances[:, ::-1].argmax(axis=1)
        return np.where(chances.max(axis=1) >= 0, last, NO_ANSWER)

    def _think(self, rows: Index) -> None:
        """Let the planner speak in some episodes; it gives no answer."""
        batch = self.backend.think(rows, self.query[rows])
        self._pay(rows, batch.cost_usd, batch.seconds)
        known = self.table.has_thoughts
        self._expected_usd[rows] += self._typical_think_usd if known else batch.cost_usd
        self._num_steps[rows] += 1
        self.states.thought[rows] = True
        self.states.can_think[rows] = False

    def _pay(self, rows: Index, usd: Float, seconds: Float) -> None:
        states = self.states
        states.steps_left[rows] -= 1
        states.spent_usd[rows] += usd
        states.usd_left[rows] -= usd
        states.seconds_left[rows] -= seconds

    def _settle(self, done: Bool, illegal: Bool) -> tuple[RewardTerms, Float, Index]:
        """The terms of this step; score and pair of the answers returned, 0 and -1 for none."""
        settings, states = self.settings.reward, self.states
        usd = states.spent_usd if settings.observed_cost else self._expected_usd
        charged = charge(settings, states.alpha, usd, states.log_cost_range)
        cost = self._charged - charged
        self._charged = charged
        out, fmt, sel, score = (np.zeros(self.num_envs, np.float32) for _ in range(4))
        pair = np.full(self.num_envs, -1, np.intp)
        rows = np.flatnonzero(done)
        if len(rows):
            step = self._returned(rows)
            answered = (step != NO_ANSWER) & ~illegal[rows]
            given = self._step_score[rows, step]
            after = np.minimum(states.thought[rows], len(self._best) - 1)
            of_table = self._best[after, self.query[rows]]
            best = np.where(states.present[rows], of_table, -np.inf).max(axis=1)
            out[rows], fmt[rows], sel[rows] = end_terms(
                settings, given, answered, ~illegal[rows], best
            )
            score[rows] = np.where(answered, given, 0.0)
            pair[rows] = np.where(answered, self._step_pair[rows, step], -1)
        return RewardTerms(out, fmt, sel, cost), score, pair


def _empty_states(size: int, dim: int, table: ReplayTable) -> States:
    """Room for the states of `size` episodes; `Episodes.reset` fills it."""
    num_pairs = table.num_pairs

    def zeros(*shape: int) -> Float:
        return np.zeros((size, *shape), np.float32)

    def no(*shape: int) -> Bool:
        return np.zeros((size, *shape), np.bool_)

    return States(
        embedding=zeros(dim),
        alpha=zeros(),
        steps_left=zeros(),
        usd_left=zeros(),
        seconds_left=zeros(),
        can_think=no(),
        thought=no(),
        present=no(num_pairs),
        descriptors=table.descriptors,
        costs_usd=zeros(num_pairs),
        seconds=np.tile(table.pair_seconds, (size, 1)),
        log_cost_range=np.zeros((size, 2)),
        quality=zeros(num_pairs),
        spread=zeros(num_pairs),
        overall=zeros(num_pairs),
        similarity=zeros(num_pairs),
        decided=zeros(num_pairs),
        chance=np.full((size, num_pairs), np.nan, np.float32),
        judged=np.full(size, table.judges is not None),
        rise=zeros(num_pairs),
        distance_quantile=zeros(),
        confidence=zeros(),
        tried=no(num_pairs),
        failed=no(num_pairs),
        logprob=zeros(num_pairs),
        tool_errors=zeros(num_pairs),
        agreement=zeros(num_pairs),
        last=np.full(size, -1, np.intp),
        last_answer=zeros(dim),
        spent_usd=zeros(),
    )
