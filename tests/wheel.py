"""The wheel of this repository, built and installed as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("serve_app", "rl")
_PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")


def tracked() -> list[str]:
    """The files of the packages that are in the repository, or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def build(folder: Path) -> Path:
    """Build the wheel from a copy of the source: building leaves files beside it."""
    source = folder / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", *tracked()):
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([*_PIP, "wheel", *options, str(source)], check=True, timeout=280)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel into a folder of its own; its dependencies are those of this Python."""
    options = ["--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*_PIP, "install", *options, str(wheel)], check=True, timeout=280)
    return folder


def environment_of(installed: Path) -> dict[str, str]:
    """The environment of a program that uses what was installed, and nothing of the repository."""
    kept = {name: value for name, value in os.environ.items() if name != "ATLAS_DATA_DIR"}
    return kept | {"PYTHONPATH": str(installed), "COLUMNS": "300"}


def atlas(installed: Path, *words: str) -> list[str]:
    """The command `atlas …` as installed."""
    return [sys.executable, str(installed / "bin" / "atlas"), *words]
