"""The wheel has everything that serves; the learning loop's questions and weights stay outside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import model_servers
from tests.model_servers import stub_engine
from tests.wheel import atlas, build, environment_of, install, tracked


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    return install(wheel, wheel.parent / "installed")


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert [name for name in tracked() if name not in inside] == []


def test_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(tracked())


def test_what_haproxy_is_started_by_can_be_run(installed: Path) -> None:
    assert os.access(installed / "serve_app" / "haproxy.sh", os.X_OK)


def test_init_and_doctor_run_from_the_wheel_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    environment = environment_of(installed)

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    place = "import serve_app; print(serve_app.__file__)"
    assert run(sys.executable, "-c", place).startswith(str(installed))
    with stub_engine(model_servers.OLLAMA) as server:
        run(*atlas(installed, "init", "--yes", "--engine", server.address))
        said = run(*atlas(installed, "doctor", "--port", "0"))
    assert "ok  HAProxy: HAProxy version" in said
    assert "0 would fail" in said
