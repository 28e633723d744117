"""Tools: what a call costs, which functions are offered, and what survives kills.

How to run: `python -m benchmarks.tools --out FILE.json [--parts calls,functions,kills,once]`. Each
part is a module of this package, which says what it does; parts that are not run keep what FILE has
of them. `functions` needs Node with `npm ci --prefix tests/npm`, and the `dev` extra.

Results to expect: see `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from benchmarks.serving import machine, show_targets
from benchmarks.stats import Target
from benchmarks.tools import calls, functions, kills, once
from benchmarks.tools.servers import what_is_missing

PARTS = ("calls", "functions", "kills", "once")
ON_RAY = frozenset({"calls", "kills"})

console = Console(width=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument("--calls", type=int, default=400, help="of each way (calls)")
    parser.add_argument("--kills", type=int, default=5, help="of child and of actor (kills)")
    parser.add_argument("--orders", type=int, default=1000, help="with a key each (once)")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {min(unknown)!r} is none of {', '.join(PARTS)}")
    if "functions" in parts and (missing := what_is_missing()):
        parser.error(f"functions: {missing}")
    logging.getLogger("mcp").setLevel(logging.CRITICAL)
    run: dict[str, Callable[[], tuple[dict[str, Any], list[Target]]]] = {
        "calls": lambda: calls.run(options.calls),
        "functions": functions.run,
        "kills": lambda: kills.run(options.kills),
        "once": lambda: once.run(options.orders),
    }
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    held: list[Target] = []
    if not ON_RAY.isdisjoint(parts):
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    for part in parts:
        found, targets = run[part]()
        held += targets
        told = {"machine": machine(), "targets": [target.as_json() for target in targets]}
        record[part] = found | told
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    show_targets(held)
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
