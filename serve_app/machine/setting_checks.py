"""What of a configuration cannot work on this machine: its models, its store, its keys.

Only loopback addresses and the configured database are contacted; what is on other machines is not
asked, and said not to be.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from serve_app.config import (
    AtlasConfig,
    CustomModelConfig,
    LocalModelConfig,
    RemoteModelConfig,
)
from serve_app.config.tools import CustomToolConfig, DebugConfig, PythonConfig, SqlConfig
from serve_app.gateway.edge.hosts import is_loopback
from serve_app.machine.checks import Check, check_memory, check_sandbox, failure, ok, warning
from serve_app.machine.engines import model_names
from serve_app.machine.hardware import GIB, Hardware
from serve_app.machine.hub import cached_weights
from serve_app.store.migrations import known_revisions

_DATABASE_TIMEOUT_S = 8.0
_FREE_DISK_BYTES = 1 << 30
_CALLED = ("function", "context")
"""Kinds of tool whose calls are tasks of Ray."""
_REVISION = "SELECT version_num FROM alembic_version"
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def check_settings(config: AtlasConfig, hardware: Hardware, host: str) -> Iterator[Check]:
    """What this configuration needs.

    Args:
        config: Of the deployment.
        hardware: The machine's.
        host: Address that `atlas serve` is to listen on.
    """
    if config.gateway.auth.mode == "open" and not is_loopback(host):
        mend = "gateway.auth.mode: required, and a key by `atlas keys create`"
        yield failure("keys", f"none is asked for, and {host} is no loopback address", mend)
    local = [model for model in config.models if isinstance(model, LocalModelConfig)]
    yield check_memory(hardware, tuple(model.startup_memory_gib for model in local))
    kinds = (PythonConfig, DebugConfig, SqlConfig)
    yield check_sandbox(tuple(t.tool_id for t in config.tools if isinstance(t, kinds)))
    yield from _gpus(local, hardware)
    yield from _processors_for_tools(config, local, hardware)
    for model in config.models:
        if isinstance(model, LocalModelConfig):
            yield _local(model)
        elif isinstance(model, RemoteModelConfig):
            yield _remote(model)
        else:
            yield _importable(f"model {model.model_id}", model)
    for tool in config.tools:
        if isinstance(tool, CustomToolConfig):
            yield _importable(f"tool {tool.tool_id}", tool)
    yield _data(config.data_path())
    yield _store(config)


def _gpus(models: list[LocalModelConfig], hardware: Hardware) -> Iterator[Check]:
    """One cluster's other nodes are not seen from here: too few is no more than a warning."""
    wanted = sum(model.bundle.get("GPU", 0) for model in models if model.autoscaling.min_replicas)
    if wanted > len(hardware.gpus):
        found = f"{len(hardware.gpus)} here, and the models ask for {wanted:g}"
        mend = "on this machine alone models will not start; a cluster needs them on its nodes"
        yield warning("GPUs", found, mend)


def _processors_for_tools(
    config: AtlasConfig, models: list[LocalModelConfig], hardware: Hardware
) -> Iterator[Check]:
    """Whether calls of tools find CPUs beside what the deployments reserve; else they time out."""
    needs = {tool.tool_id: tool.num_cpus for tool in config.tools if tool.kind in _CALLED}
    if not needs:
        return
    graph = (config.gateway.deployment, config.router.deployment, config.embedder.deployment)
    reserved = sum(max(1, of.autoscaling.min_replicas) * of.num_cpus for of in graph)
    reserved += sum(
        of.autoscaling.min_replicas * (of.num_cpus + of.bundle.get("CPU", 0.0)) for of in models
    )
    left = max(0.0, hardware.cpus - reserved)
    greatest = max(needs, key=lambda tool_id: needs[tool_id])
    if left < min(2 * needs[greatest], sum(needs.values())):
        found = (
            f"the deployments reserve {reserved:.2f} of {hardware.cpus} here, and a call of "
            f"{greatest!r} takes {needs[greatest]:g} more"
        )
        mend = "lower num_cpus of models (and bundle.CPU) or tools, or calls wait and time out"
        yield warning("CPUs for tools", found, mend)


def _local(model: LocalModelConfig) -> Check:
    subject = f"model {model.model_id}"
    if importlib.util.find_spec("vllm") is None:
        mend = "install atlas-serve[cpu] or atlas-serve[gpu], or take remote models"
        return failure(subject, "vLLM is not installed", mend)
    if model.model_source.startswith("/"):
        if not Path(model.model_source, "config.json").is_file():
            return failure(subject, "no config.json in model_source", "name a folder with weights")
        return ok(subject, "weights in a folder")
    if cached_weights(model.model_source):
        return ok(subject, f"weights of {model.model_source} are in the cache")
    found = f"weights of {model.model_source} are not here"
    return warning(subject, found, "the first start downloads them from huggingface.co")


def _remote(model: RemoteModelConfig) -> Check:
    subject = f"model {model.model_id}"
    variable = model.api_key_env
    if variable is not None and not os.environ.get(variable):
        return failure(subject, f"{variable} holds no key", f"export {variable}=…")
    url = urlsplit(model.base_url)
    if not is_loopback(url.hostname or ""):
        return ok(subject, f"at {url.hostname}, which is not asked")
    names = model_names(model.base_url)
    if names is None:
        mend = "start the server there; the model is tried again until it answers"
        return failure(subject, f"nothing answers at {model.base_url}", mend)
    if names and model.remote_model not in names:
        mend = f"it has {', '.join(names[:5])}; `atlas init` finds them"
        return failure(subject, f"the server has no {model.remote_model!r}", mend)
    return ok(subject, f"answers at {model.base_url}")


def _importable(subject: str, named: CustomModelConfig | CustomToolConfig) -> Check:
    module = named.import_path.partition(":")[0]
    try:
        is_there = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        is_there = False
    if is_there:
        return ok(subject, f"{module} can be found")
    return failure(subject, f"no module {module!r}", "install it, or set PYTHONPATH")


def _data(folder: Path) -> Check:
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return failure("data", f"{folder} cannot be written to", "set data_dir or ATLAS_DATA_DIR")
    free = shutil.disk_usage(there).free
    found = f"{folder}, {free / GIB:.1f} GiB free"
    if free < _FREE_DISK_BYTES:
        return warning("data", found, "make room, or set data_dir or ATLAS_DATA_DIR")
    return ok("data", found)


def _store(config: AtlasConfig) -> Check:
    missing = [name for name in _VARIABLE.findall(config.store.url) if name not in os.environ]
    if missing:
        return failure("store", f"{missing[0]} is not set", f"export {missing[0]}=…")
    try:
        url = make_url(config.store_url())
        if url.get_backend_name() == "sqlite":
            return _sqlite(Path(str(url.database)))
        asyncio.run(_ask_database(config.store_url()))
    except ImportError as error:
        return failure("store", f"{error.name} is not installed", "install atlas-serve[postgres]")
    except (OSError, SQLAlchemyError, TimeoutError) as error:
        found = f"the database does not answer ({type(error).__name__})"
        return failure("store", found, "start it, and check store.url, its user and its password")
    return ok("store", f"{url.get_backend_name()} answers")


def _sqlite(file: Path) -> Check:
    if not file.exists() or file.stat().st_size == 0:
        return ok("store", "SQLite; made by the first start")
    try:
        database = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)
        try:
            revisions = database.execute(_REVISION).fetchall()
        finally:
            database.close()
    except sqlite3.Error as error:
        mend = "bring back a copy, or move the file away: a new one is made"
        return failure("store", f"{file}: {error}", mend)
    unknown = [revision for (revision,) in revisions if revision not in known_revisions()]
    if unknown:
        found = f"{file} is of a newer version (schema {unknown[0]})"
        return failure("store", found, "serve it with that version, or set another store.url")
    return ok("store", f"SQLite, {file.stat().st_size / 2**20:.1f} MiB")


async def _ask_database(url: str) -> None:
    engine = create_async_engine(url)
    try:
        async with asyncio.timeout(_DATABASE_TIMEOUT_S), engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    finally:
        await engine.dispose()
