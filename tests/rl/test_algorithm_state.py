"""RLlib's part of a checkpoint is data: what comes back is what was saved, and no code runs."""

from __future__ import annotations

import json
import pickle
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.ppo.algorithm_state import load_state, save_state
from serve_app.errors import ConfigError

STATE: dict[str, Any] = {
    "weights": {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "step": np.array(3)},
    "optimizer": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(5.0)}, "betas": (0.9, 0.99)},
    "values": deque([1.0, np.float32(2.5)], maxlen=3),
    "window": None,
    "nan": float("nan"),
    "rows": [1, True, "text", [], {}],
}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save_state(STATE, tmp_path / "a")
    found = load_state(tmp_path / "a")
    np.testing.assert_array_equal(found["weights"]["a"], STATE["weights"]["a"])
    assert found["weights"]["step"].shape == ()
    assert torch.equal(found["optimizer"][0]["exp_avg"], torch.ones(2))
    assert found["optimizer"][0]["step"].shape == ()
    assert found["optimizer"]["betas"] == (0.9, 0.99)
    assert found["values"] == deque([1.0, 2.5])
    assert found["values"].maxlen == 3
    assert found["window"] is None
    assert np.isnan(found["nan"])
    assert found["rows"] == STATE["rows"]


def test_what_is_no_data_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no data: function"):
        save_state({"policies": lambda: None}, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class _Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["algorithm.json", "algorithm.safetensors", "algorithm_state.pkl"])
def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path: Path, name: str) -> None:
    trap = pickle.dumps(_Trap(tmp_path / "sprung"))
    save_state(STATE, tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(trap)
    if name == "algorithm_state.pkl":
        load_state(tmp_path / "a")
    else:
        with pytest.raises(ConfigError, match="cannot be read"):
            load_state(tmp_path / "a")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)  # the control: read as a pickle it is run
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "shape", [{}, ["dict", [["a"]]], ["call", "os.system"], ["array", "../x"], [], "x" * 9, None]
)
def test_a_shape_that_is_none_is_refused(tmp_path: Path, shape: Any) -> None:
    save_state(STATE, tmp_path / "a")
    (tmp_path / "a" / "algorithm.json").write_text(json.dumps(shape))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_state(tmp_path / "a")
