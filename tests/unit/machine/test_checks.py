"""What `atlas doctor` finds wrong, one thing at a time."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from sqlalchemy import text

from serve_app.config import AtlasConfig, load_config
from serve_app.machine import checks, hardware
from serve_app.machine.checks import Check, Level, check_machine, check_memory, check_sandbox
from serve_app.machine.hardware import Hardware, look_at_hardware
from serve_app.machine.setting_checks import check_settings
from serve_app.store import Store
from tests import model_servers
from tests.model_servers import stub_engine

MACHINE = Hardware(cpus=4, memory_gib=16, free_gib=12)


def found(checked: Iterable[Check], subject: str) -> Check:
    (one,) = [check for check in checked if check.subject == subject]
    assert bool(one.mend) == (one.level is not Level.OK), one
    return one


def settings(folder: Path, **changes: object) -> AtlasConfig:
    remote = {"type": "remote", "model_id": "m", "base_url": "http://127.0.0.1:1/v1"}
    config: dict[str, object] = {"models": [remote | {"remote_model": "x"}], "data_dir": "./data"}
    (folder / "atlas.yaml").write_text(yaml.safe_dump(config | changes))
    return load_config(folder / "atlas.yaml")


def of_settings(config: AtlasConfig, subject: str, host: str = "127.0.0.1") -> Check:
    return found(check_settings(config, MACHINE, host), subject)


def remote(**changes: object) -> list[dict[str, object]]:
    return [{"type": "remote", "model_id": "m", "remote_model": "llama3.2:3b"} | changes]


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATLAS_DATA_DIR", raising=False)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        check = found(check_machine(MACHINE, "127.0.0.1", port), "port")
    assert check.level is Level.FAILURE
    assert check.found == f"127.0.0.1:{port} is taken"


def test_haproxy_s_own_port_that_is_taken_names_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", str(other.getsockname()[1]))
        failed = [c for c in check_machine(MACHINE, "127.0.0.1", 0) if c.level is Level.FAILURE]
    assert [check.mend for check in failed] == ["set RAY_SERVE_HAPROXY_STATS_PORT to a free one"]


def test_haproxy_runs_by_the_script_that_closes_its_doors() -> None:
    check = found(check_machine(MACHINE, "127.0.0.1", 0), "HAProxy")
    assert check.level is Level.OK
    assert check.found.startswith("HAProxy version")


def test_another_version_of_ray_than_the_pinned_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.59.1")
    check = found(check_machine(MACHINE, "127.0.0.1", 0), "Ray")
    assert check.level is Level.FAILURE
    assert check.mend == "pip install 'ray[serve]==2.60.0'"


@pytest.mark.parametrize(
    ("hard", "level"),
    [(1_024, Level.FAILURE), (20_000, Level.WARNING), (1 << 20, Level.OK)],
)
def test_too_few_open_files_are_said(
    hard: int, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_024, hard))
    check = found(check_machine(MACHINE, "127.0.0.1", 0), "open files")
    assert check.level is level


@pytest.mark.parametrize(
    ("starts_gib", "level"),
    [((), Level.OK), ((5.0,), Level.OK), ((5.0, 7.0), Level.WARNING), ((20.0,), Level.FAILURE)],
)
def test_models_that_do_not_fit_into_memory_are_said(
    starts_gib: tuple[float, ...], level: Level
) -> None:
    assert check_memory(MACHINE, starts_gib).level is level


def test_a_container_s_limit_counts_as_the_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2**28}\n")
    assert hardware._memory_bytes(tmp_path) == (2**30, 2**29 + 2**28)


def test_without_a_limit_the_machine_s_memory_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    total, free = hardware._memory_bytes(tmp_path)
    assert total > free > 0


def test_a_sandbox_that_does_not_start_fails_where_a_tool_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "sandbox_missing", lambda: "no Landlock")
    assert check_sandbox(("python",)).found == "no Landlock"
    assert check_sandbox(("python",)).level is Level.FAILURE
    assert check_sandbox(()).level is Level.OK


def test_nvidia_s_own_program_is_asked_for_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771'\necho 'NVIDIA GB10, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (gpu,) = look_at_hardware().gpus
    assert (gpu.name, round(gpu.memory_gib)) == ("NVIDIA H200", 140)


def test_a_driver_that_fails_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'couldn't communicate with the driver'\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert look_at_hardware().gpus == ()


def test_a_server_that_is_away_or_lacks_the_model_fails(tmp_path: Path) -> None:
    with stub_engine(model_servers.OLLAMA) as server:
        url = f"http://{server.address}/v1"
        there = settings(tmp_path, models=remote(base_url=url))
        other = settings(tmp_path, models=remote(base_url=url, remote_model="mistral"))
        assert of_settings(there, "model m").level is Level.OK
        lacking = of_settings(other, "model m")
    assert lacking.level is Level.FAILURE
    assert lacking.mend.startswith("it has llama3.2:3b")
    away = of_settings(there, "model m")
    assert (away.level, away.found) == (Level.FAILURE, f"nothing answers at {url}")


def test_a_key_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(
        tmp_path, models=remote(base_url="https://api.example.com/v1", api_key_env="SOME_KEY")
    )
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert of_settings(config, "model m").mend == "export SOME_KEY=…"
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    check = of_settings(config, "model m")
    assert (check.level, check.found) == (Level.OK, "at api.example.com, which is not asked")


def test_weights_that_are_nowhere_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    local = {"type": "local", "model_id": "m", "model_source": "Qwen/Qwen2.5-0.5B-Instruct"}
    config = settings(tmp_path, models=[local])
    assert of_settings(config, "model m").level is Level.WARNING
    weights = tmp_path / "hub/models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/1/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert of_settings(config, "model m").level is Level.OK
    missing = settings(tmp_path, models=[local | {"model_source": "./none"}])
    assert of_settings(missing, "model m").level is Level.FAILURE


def test_more_gpus_than_are_here_are_said(tmp_path: Path) -> None:
    local = {"type": "local", "model_id": "m", "model_source": "a/b", "bundle": {"GPU": 1}}
    assert of_settings(settings(tmp_path, models=[local]), "GPUs").level is Level.WARNING


@pytest.mark.parametrize(("cpus", "is_enough"), [(1, False), (2, True)])
def test_too_few_cpus_for_calls_of_tools_are_said(
    tmp_path: Path, cpus: int, is_enough: bool
) -> None:
    local = {"type": "local", "model_id": "m", "model_source": "a/b", "bundle": {"CPU": 0.4}}
    tools = [{"type": "python", "tool_id": "python"}, {"type": "calculator", "tool_id": "sums"}]
    config = settings(tmp_path, models=[local], tools=tools)
    said = [check for check in check_settings(config, replace(MACHINE, cpus=cpus), "127.0.0.1")
            if check.subject == "CPUs for tools"]  # fmt: skip
    assert [check.level for check in said] == ([] if is_enough else [Level.WARNING])
    assert is_enough or "reserve 0.80 of 1 here, and a call of 'python' takes 0.25" in said[0].found


def test_a_class_of_ones_own_that_cannot_be_found_fails(tmp_path: Path) -> None:
    own = {"type": "custom", "model_id": "m", "import_path": "nowhere.to_be:Found"}
    assert of_settings(settings(tmp_path, models=[own]), "model m").level is Level.FAILURE


def test_no_keys_beyond_loopback_fail(tmp_path: Path) -> None:
    assert of_settings(settings(tmp_path), "keys", host="0.0.0.0").level is Level.FAILURE


async def test_a_store_is_looked_at_and_not_made(tmp_path: Path) -> None:
    config = settings(tmp_path)
    assert of_settings(config, "store").found == "SQLite; made by the first start"
    assert not (tmp_path / "data").exists()
    await (await Store.open(config.store_url())).close()
    assert of_settings(config, "store").level is Level.OK


async def test_a_store_of_a_newer_version_fails(tmp_path: Path) -> None:
    config = settings(tmp_path)
    store = await Store.open(config.store_url())
    async with store.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = 'v9999'"))
    await store.close()
    check = of_settings(config, "store")
    assert (check.level, "newer version (schema v9999)" in check.found) == (Level.FAILURE, True)


def test_a_damaged_store_fails(tmp_path: Path) -> None:
    config = settings(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "atlas.db").write_bytes(b"no database at all" * 1000)
    check = of_settings(config, "store")
    assert check.level is Level.FAILURE
    assert "not a database" in check.found


def test_a_database_that_does_not_answer_fails_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        url = {"url": "${STORE_URL}"}
        config = settings(tmp_path, store=url)
        assert of_settings(config, "store").found == "STORE_URL is not set"
        monkeypatch.setenv("STORE_URL", f"postgresql+asyncpg://me:s3cret@127.0.0.1:{port}/atlas")
        check = of_settings(config, "store")
    assert check.level is Level.FAILURE
    assert "does not answer" in check.found
    assert "s3cret" not in check.found + check.mend


def test_a_folder_that_cannot_be_made_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = settings(tmp_path, data_dir="./file/data")
    assert of_settings(config, "data").level is Level.FAILURE
