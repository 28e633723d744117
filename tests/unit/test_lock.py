"""What is installed is what was pinned: every requirement of every lock names its files' hashes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / ".ci").glob("requirements-*.lock"))


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_requirement_of_a_lock_has_an_exact_version_and_a_hash(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    requirements = "\n".join(lines).replace("\\\n", " ").splitlines()
    assert requirements
    for requirement in requirements:
        assert re.match(r"^[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+ ", requirement), requirement[:80]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}(\s|$)", requirement), requirement[:80]


def test_pip_refuses_a_file_whose_hash_is_not_in_the_lock(tmp_path: Path) -> None:
    package = tmp_path / "changed-1.0"
    package.mkdir()
    (package / "setup.py").write_text("raise SystemExit('this must not run')")
    subprocess.run(["tar", "czf", "changed-1.0.tar.gz", "changed-1.0"], cwd=tmp_path, check=True)
    (tmp_path / "lock").write_text(f"changed==1.0 --hash=sha256:{'0' * 64}\n")
    places = ["--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "to")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *install_options(), *places, "-r", "lock"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert "this must not run" not in done.stdout + done.stderr


def test_the_cluster_installs_from_the_lock() -> None:
    commands = (ROOT / "cluster.yaml").read_text()
    assert "--require-hashes -r" in commands
    assert "requirements-gpu.lock" in commands


def install_options() -> list[str]:
    """The options that `make setup` installs every locked package with."""
    found = re.search(r"^INSTALL := \$\(PIP\) install (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert found is not None
    return found.group(1).split()
