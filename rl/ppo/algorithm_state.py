"""RLlib's part of a checkpoint as data: JSON for its shape, safetensors for its arrays.

RLlib's own checkpoints are pickles, and reading one runs whatever code is in it. A run's folder may
lie on a volume that others write to; what is read here can at worst be wrong numbers.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from serve_app.errors import ConfigError

_SHAPE_FILE, _ARRAYS_FILE = "algorithm.json", "algorithm.safetensors"

Arrays = dict[str, NDArray[Any]]


def save_state(state: Mapping[str, Any], folder: str | Path) -> None:
    """Write what an algorithm's `get_state` gave into a new folder.

    Raises:
        TypeError: If there is something in it that is no data.
    """
    arrays: Arrays = {}
    shape = _encoded(dict(state), arrays)
    path = Path(folder)
    path.mkdir(parents=True)
    save_file(arrays, path / _ARRAYS_FILE)
    (path / _SHAPE_FILE).write_text(json.dumps(shape))


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote, for an algorithm's `set_state`.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        arrays = load_file(Path(folder) / _ARRAYS_FILE)
        state = _decoded(json.loads((Path(folder) / _SHAPE_FILE).read_text()), arrays)
        return dict(state)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ConfigError(
            f"the last checkpoint of this run cannot be read ({type(error).__name__}): name "
            "another folder"
        ) from error


def _encoded(value: Any, arrays: Arrays) -> Any:
    """A value as JSON: scalars as they are, everything else as `[kind, content]`."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int)):
                raise TypeError(f"a key of the state is no text or number: {key!r}")
        return ["dict", [[key, _encoded(held, arrays)] for key, held in value.items()]]
    if isinstance(value, deque):
        return ["deque", value.maxlen, [_encoded(held, arrays) for held in value]]
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_encoded(held, arrays) for held in value]]
    if isinstance(value, (np.ndarray, torch.Tensor)):
        name = str(len(arrays))
        if isinstance(value, torch.Tensor):
            arrays[name] = value.detach().cpu().numpy().copy()
            return ["tensor", name]
        arrays[name] = np.array(value, order="C")
        return ["array", name]
    raise TypeError(f"the state has something that is no data: {type(value).__name__}")


def _decoded(value: Any, arrays: Arrays) -> Any:
    """Undo `_encoded`.

    Raises:
        ValueError: If it was not made by it.
    """
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError("an object where a list is expected")
        return value
    kind, *content = value
    if kind == "dict":
        return {key: _decoded(held, arrays) for key, held in content[0]}
    if kind == "deque":
        return deque([_decoded(held, arrays) for held in content[1]], maxlen=content[0])
    if kind in ("list", "tuple"):
        held = [_decoded(each, arrays) for each in content[0]]
        return held if kind == "list" else tuple(held)
    if kind == "tensor":
        return torch.from_numpy(arrays[content[0]])
    if kind == "array":
        return arrays[content[0]]
    raise ValueError(f"no such kind: {kind!r}")
