"""Where PPO starts: the rule `voi`, and what the record alone teaches beyond it.

In come tables, out come first weights. One run is learned by its exact expected utility: the
outcome of every candidate is known, so the gradient needs no draws. Several runs are learned from a
teacher, on the states that the network itself comes by (Ross et al., 2011). Whatever did best on
the questions apart is kept, the rule itself included.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from rl.ppo.config import TrainConfig
from rl.ppo.episodes import Episodes
from rl.ppo.reward import charge
from rl.ppo.rollout import Chooser, Greedy
from rl.ppo.sampling import Augmentation, augmented
from rl.ppo.table import ReplayTable
from rl.ppo.teacher import Teacher
from rl.ppo.torch_policy_net import WORTH_WEIGHT, TorchPolicyNet
from serve_app.router.policy.features import NO_ANSWER, open_actions
from serve_app.router.policy.policy_net import PolicyNet

RULE, ONE_STEP, IMITATION = "voi", "one step", "imitation"
"""Stages, and what they are called."""
TEACHER = "teacher"
"""Its own utility, which is no stage: a ceiling for what the signals allow."""
_TENSORS_FILE, _STAGES_FILE = "start.safetensors", "start.json"
_LARGEST_VALUE = 2.0

Float = NDArray[np.float32]


@dataclass(frozen=True)
class WarmStart:
    """The weights that PPO starts with."""

    tensors: Mapping[str, Float]
    """See `PolicyNet`."""
    stage: str
    """Which one they are of."""
    utilities: Mapping[str, float]
    """Stage to its mean utility on the questions apart; and the teacher's, where there is one."""

    @property
    def utility(self) -> float:
        """Of these weights."""
        return self.utilities[self.stage]

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        save_file(dict(self.tensors), folder / _TENSORS_FILE)
        about = {"stage": self.stage, "utilities": dict(self.utilities)}
        unfinished = folder / f".{_STAGES_FILE}"
        unfinished.write_text(json.dumps(about, indent=1))
        unfinished.rename(folder / _STAGES_FILE)

    @classmethod
    def read(cls, folder: Path) -> WarmStart | None:
        """What a run's folder has; `None`: it was never written to its end."""
        about = folder / _STAGES_FILE
        if not about.exists():
            return None
        return cls(load_file(folder / _TENSORS_FILE), **json.loads(about.read_text()))


def warm_start(
    table: ReplayTable,
    apart: ReplayTable,
    settings: TrainConfig,
    measure: Callable[[Chooser], float],
    tell: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> WarmStart:
    """Learn the first weights.

    Args:
        table: Questions to train on, with the outcome of every candidate that may run.
        apart: Questions that are not trained on.
        settings: Of the training.
        measure: Mean utility on the questions apart.
        tell: Called with the stage, and how many of its updates are done, of how many.
    """
    net = _untrained(table, settings)
    best, stage = net.to_tensors(), RULE
    utilities = {RULE: measure(Greedy(PolicyNet(best)))}
    taught = table.judges is not None and table.judges.alone is not None
    stages: list[tuple[str, int, type[_Stage]]] = [(ONE_STEP, settings.warm_start.one_step, _Exact)]
    if taught and settings.env.max_steps > 1:
        utilities[TEACHER] = measure(Teacher(table, apart))
        stages.append((IMITATION, settings.warm_start.imitation, _Imitation))
    for name, num_updates, kind in stages:
        if not num_updates:
            continue
        learning = kind(net, table, settings)
        optimiser = torch.optim.Adam(net.parameters(), settings.warm_start.lr)
        net.train()
        for done in range(num_updates):
            loss = learning.loss()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), settings.grad_clip or 1.0)
            optimiser.step()
            tell(name, done + 1, num_updates)
        net.eval()
        learnt = net.to_tensors()
        utilities[name] = measure(Greedy(PolicyNet(learnt)))
        if utilities[name] > utilities[stage]:
            best, stage = learnt, name
    return WarmStart(best, stage, utilities)


def _untrained(table: ReplayTable, settings: TrainConfig) -> TorchPolicyNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return TorchPolicyNet(table.embeddings.shape[1], **settings.net.model_dump())


class _Stage(ABC):
    """Makes losses of a network on states of a table's episodes."""

    number: int
    """Tells the draws of one stage from those of another."""

    def __init__(self, net: TorchPolicyNet, table: ReplayTable, settings: TrainConfig) -> None:
        self.net, self.table, self.settings = net, table, settings
        self.random = np.random.default_rng([settings.seed, self.number])
        self.episodes = Episodes(table, settings.warm_start.batch, settings.env)
        self.episodes.seed(int(self.random.integers(2**62)))
        self._augmentation = Augmentation(**settings.augmentation.model_dump())

    @abstractmethod
    def loss(self) -> Tensor:
        """Of one batch of states."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """Logits and values of all episodes, seen as in PPO's sampling."""
        episodes = self.episodes
        seen = augmented(episodes.observe(), episodes.view, self._augmentation, self.random)
        logits, values = self.net({name: torch.from_numpy(of) for name, of in seen.items()})
        return logits, values


class _Exact(_Stage):
    """One run each: minus the expected utility over all that the policy might run."""

    number = 1

    def loss(self) -> Tensor:
        episodes, table = self.episodes, self.table
        episodes.reset(max_steps=1)
        states, query = episodes.states, episodes.query
        reward = self.settings.env.reward
        wide = states.costs_usd.shape
        charged = charge(
            reward,
            np.repeat(states.alpha, wide[1]),
            states.costs_usd.ravel(),
            np.repeat(states.log_cost_range, wide[1], axis=0),
        ).reshape(wide)
        answered = table.answer_key[0, query] != NO_ANSWER
        score = np.where(answered, table.score[0, query], -reward.format_penalty)
        logits, _ = self.forward()
        chances = logits.softmax(dim=1)[:, : wide[1]]
        utility = torch.from_numpy((score - charged).astype(np.float32))
        return -(chances * utility).sum(dim=1).mean()


class _Imitation(_Stage):
    """Towards the teacher's values, on the states that the network's own draws lead to."""

    number = 2

    def __init__(self, net: TorchPolicyNet, table: ReplayTable, settings: TrainConfig) -> None:
        super().__init__(net, table, settings)
        self._teacher = Teacher(table)
        self.episodes.reset()

    def loss(self) -> Tensor:
        episodes = self.episodes
        everyone = np.arange(episodes.num_envs)
        worth = self._teacher.values(episodes, everyone)
        legal = open_actions(episodes.states, episodes.legal())
        logits, values = self.forward()
        wanted = torch.from_numpy(np.where(legal, WORTH_WEIGHT * worth, -np.inf))
        wanted = wanted.to(torch.float32).log_softmax(dim=1)
        said = logits.log_softmax(dim=1)
        apart = (wanted.exp() * (wanted - said)).masked_fill(torch.from_numpy(~legal), 0.0)
        critic = (values - self._value(worth, legal)).square().mean()
        loss = apart.sum(dim=1).mean() + self.settings.vf_loss_coeff * critic
        noise = self.random.gumbel(size=logits.shape).astype(np.float32)
        done = episodes.step((logits.detach().numpy() + noise).argmax(axis=1)).done
        episodes.reset(np.flatnonzero(done))
        return loss

    def _value(self, worth: Float, legal: NDArray[np.bool_]) -> Tensor:
        """(B,) reward to come: what is held, and what the best action adds, in units of score."""
        states = self.episodes.states
        held = np.nan_to_num(states.chance).max(axis=1)
        more = np.where(legal, worth, -np.inf).max(axis=1) / np.maximum(1 - states.alpha, 1e-3)
        return torch.from_numpy(
            np.clip(held + more, -_LARGEST_VALUE, _LARGEST_VALUE).astype(np.float32)
        )


def described(start: WarmStart) -> dict[str, Any]:
    """As plain values, without the weights."""
    plain = asdict(start)
    del plain["tensors"]
    return plain
