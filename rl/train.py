"""`python -m rl.train`: `atlas train` as a command of its own, for `ray job submit`."""

from __future__ import annotations

import typer

from rl.cli.training import train_command

if __name__ == "__main__":
    typer.run(train_command)
