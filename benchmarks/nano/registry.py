"""Names of the nano models and where each one's generator, evaluation cells and weights are.

Cheap to import: a generator module is loaded only when asked for, and none needs torch or vLLM.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from benchmarks.nano.task import EvalCell, TaskGenerator

WEIGHTS_ROOT = Path(__file__).parents[2] / "configs" / "nano" / "weights"


@dataclass(frozen=True)
class ModelShape:
    """Size of one nano model; a Llama with tied embeddings and heads of 32 dimensions."""

    hidden_size: int
    num_layers: int
    mlp_size: int
    vocab_size: int
    induction_init: bool = False
    """Whether training starts with a pair of heads that copy; see `induction_init.py`."""


SHAPES: dict[str, ModelShape] = {
    "math": ModelShape(hidden_size=128, num_layers=4, mlp_size=352, vocab_size=1280),
    "facts": ModelShape(
        hidden_size=128, num_layers=5, mlp_size=352, vocab_size=1792, induction_init=True
    ),
    "code": ModelShape(hidden_size=128, num_layers=4, mlp_size=448, vocab_size=1280),
}
"""Per short name; the model id is `nano-<name>`."""

TOKENS: dict[str, int] = {"math": 7_600_000, "facts": 10_500_000, "code": 8_500_000}
"""Training budgets that reach the published figures: 20 to 35 minutes of one idle core. Tokens
rather than minutes, so that a run comes out the same on a busy machine."""

QUESTION_SETS: tuple[str, ...] = (*SHAPES, "database", "clock")
"""Whose labelled questions ship: the models' own, and those of tools that a model has learned."""


def task_module(name: str) -> ModuleType:
    """The module `benchmarks.nano.<name>_tasks`.

    Raises:
        ValueError: If there is no nano model of that name.
    """
    if name not in SHAPES:
        raise ValueError(f"no nano model {name!r}; choose one of {', '.join(SHAPES)}")
    return importlib.import_module(f"benchmarks.nano.{name}_tasks")


def load_generator(name: str) -> TaskGenerator:
    """The generator of a nano model, by short name."""
    generator: TaskGenerator = task_module(name).GENERATOR
    return generator


def question_source(name: str) -> TaskGenerator:
    """The generator of a set of labelled questions, out of `QUESTION_SETS`."""
    modules = {"database": "sql_tasks", "clock": "clock_tasks"}
    if name not in modules:
        return load_generator(name)
    source: TaskGenerator = importlib.import_module(f"benchmarks.nano.{modules[name]}").GENERATOR
    return source


def load_cells(name: str) -> tuple[EvalCell, ...]:
    """The cells of a nano model's evaluation table, by short name."""
    cells: tuple[EvalCell, ...] = task_module(name).EVAL_CELLS
    return cells


def weights_dir(name: str) -> Path:
    """Where the weights of a nano model ship."""
    return WEIGHTS_ROOT / f"nano-{name}"
