"""What comes over HTTP, or out of the store, names no code, file or secret that the file does not
allow: the real gateway, store and pool."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError

from serve_app.config import SAFE_ENGINE_KWARGS, AtlasConfig, RemoteModelConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.chat.parsing import validate
from serve_app.gateway.chat.wire import ModelSubmission, ToolSubmission
from serve_app.pool.allow_list import AllowList
from serve_app.pool.desired import DesiredPool
from serve_app.store import Store, add_pool, newest_pool
from tests.gateway_fakes import running_gateway

Json = dict[str, Any]

LOCAL: Json = {"type": "local", "model_id": "new", "model_source": "org/model-7b"}
REMOTE: Json = {
    "type": "remote",
    "model_id": "new",
    "base_url": "https://api.example.com/v1",
    "remote_model": "m",
}
CUSTOM: Json = {"type": "custom", "model_id": "new", "import_path": "os:system"}
RETRIEVAL: Json = {"type": "retrieval", "tool_id": "new"}
PYTHON: Json = {"type": "python", "tool_id": "new"}
CUSTOM_TOOL: Json = {"type": "custom", "tool_id": "new", "import_path": "os:system"}
FETCH: Json = {"type": "fetch", "tool_id": "new"}
SEARCH: Json = {"type": "web_search", "tool_id": "new", "base_url": "https://api.example.com"}
API: Json = {
    "type": "http",
    "tool_id": "new",
    "description": "x",
    "spec": "{}/specs/good.json",
    "server": "https://api.example.com/v2",
}
FILES_API: Json = {
    **API,
    "tool_id": "crm",
    "spec": "/srv/crm.json",
    "server": None,
    "headers": {"Authorization": "${CRM_KEY}"},
    "operations": ["read"],
}
SQL: Json = {"type": "sql", "tool_id": "new"}
FILES: Json = {"type": "files", "tool_id": "new"}
COMMAND: Json = {"type": "mcp", "tool_id": "new", "command": "npx"}
SERVER: Json = {"type": "mcp", "tool_id": "new", "url": "https://api.example.com/mcp"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("weights/good", "corpora/good", "specs", "outside"):
        (tmp_path / name).mkdir(parents=True)
    for root in ("weights", "corpora", "specs"):
        (tmp_path / root / "link").symlink_to(tmp_path / "outside")
    return tmp_path


@pytest.fixture
def config(folders: Path) -> AtlasConfig:
    trusted = {"model_source": "org/odd", "env": {"A": "b"}}
    code = {"trust_remote_code": True, "revision": COMMIT, "code_revision": COMMIT}
    models = [
        {**LOCAL, "model_id": "odd", **trusted, "engine_kwargs": code},
        {**REMOTE, "model_id": "far", "base_url": "http://u:p@elsewhere/v1", "api_key_env": "X"},
        {**CUSTOM, "model_id": "own", "settings": {"a": 1}},
    ]
    tools = [
        {**RETRIEVAL, "tool_id": "docs", "corpus": "/srv/docs", "cache_dir": "/srv/cache"},
        {**CUSTOM_TOOL, "tool_id": "own", "settings": {"a": 1}},
        {**FETCH, "tool_id": "inner", "allow": ["wiki.internal"]},
        FILES_API,
        {**COMMAND, "tool_id": "run", "args": ["-y", "mine"]},
    ]
    allowed = {
        "model_roots": [str(folders / "weights")],
        "corpora_root": str(folders / "corpora"),
        "specs_root": str(folders / "specs"),
        "python_packages": ["numpy"],
        "remotes": [
            {"origin": "https://api.example.com", "api_key_env": "EXAMPLE_API_KEY"},
            {"origin": "http://127.0.0.1:9999"},
        ],
    }
    return AtlasConfig.model_validate(
        {"models": models, "tools": tools, "pool": {"admin_api": allowed}}
    )


def check(config: AtlasConfig, settings: Json) -> None:
    """As the gateway does with a body."""
    if "model_id" in settings:
        AllowList(config).check_model(validate(ModelSubmission, settings, strict=True).root)
    else:
        said = validate(ToolSubmission, {"tool": settings}, strict=True)
        AllowList(config).check_tool(said.tool)


def placed(settings: Json, folders: Path) -> Json:
    """The settings, with the test's folder in each `{}`."""
    return {
        name: value.replace("{}", str(folders)) if isinstance(value, str) else value
        for name, value in settings.items()
    }


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({**LOCAL, "engine_kwargs": {"trust_remote_code": True}}, "trust_remote_code"),
        *(
            ({**LOCAL, "engine_kwargs": {name: value}}, f"engine_kwargs.{name}")
            for name, value in (
                ("reasoning_parser_plugin", "/tmp/x.py"),
                ("tool_parser_plugin", "/tmp/x.py"),
                ("logits_processors", ["a.b:C"]),
                ("worker_cls", "a.b.C"),
                ("distributed_executor_backend", "a.b.C"),
                ("load_format", "pt"),
                ("hf_overrides", {"auto_map": {}}),
                ("kv_transfer_config", {"kv_connector_module_path": "a.b"}),
                ("chat_template", "/etc/passwd"),
                ("hf_token", "x"),
                ("model", "/etc"),
                ("tokenizer", "/etc"),
                ("download_dir", "/etc"),
                ("quantization", "../x"),
                ("dtype", {"a": 1}),
                ("max_num_seqs", [1]),
            )
        ),
        ({**LOCAL, "env": {"LD_PRELOAD": "/tmp/x.so"}}, "env"),
        ({**LOCAL, "model_source": "/etc"}, "model_source"),
        ({**LOCAL, "model_source": "./x"}, "model_source"),
        ({**LOCAL, "model_source": "../x"}, "model_source"),
        ({**LOCAL, "model_source": "org/../../x"}, "model_source"),
        ({**LOCAL, "model_source": "s3://bucket/x"}, "model_source"),
        ({**LOCAL, "model_source": "{}/outside"}, "model_source"),
        ({**LOCAL, "model_source": "{}/weights/link"}, "model_source"),
        ({**LOCAL, "model_source": "{}/weights/../outside"}, "model_source"),
        ({**LOCAL, "model_source": "{}/weights-too"}, "model_source"),
        # The file's own, with another part: what the file trusts it trusts as a whole.
        (
            {
                **LOCAL,
                "model_id": "odd",
                "env": {"A": "b"},
                "engine_kwargs": {
                    "trust_remote_code": True,
                    "revision": COMMIT,
                    "code_revision": COMMIT,
                },
            },
            "env",
        ),
        ({**LOCAL, "model_id": "far", "env": {"A": "b"}}, "env"),
        *(
            ({**REMOTE, "base_url": url}, "base_url")
            for url in (
                "http://169.254.169.254/latest",
                "http://127.0.0.1:8265/api",
                "http://localhost:9999/v1",
                "http://[::1]:9999/v1",
                "http://[fe80::1]/v1",
                "http://0x7f000001:9999/v1",
                "http://2130706433:9999/v1",
                "http://metadata.google.internal/v1",
                "http://api.example.com/v1",
                "https://api.example.com:8443/v1",
                "https://api.example.com.evil.test/v1",
                "https://api.example.com@evil.test/v1",
                "https://evil.test\\@api.example.com/v1",
                "https://evil.test#@api.example.com/v1",
                "https://evil.test?@api.example.com/v1",
                "https://user:pass@api.example.com/v1",
                "https://api.example.com./v1",
                "https://api.example.com:99999/v1",
                "https://api.example.com/v1\n",
                "https://\u0430pi.example.com/v1",
            )
        ),
        ({**REMOTE, "api_key_env": "OTHER_API_KEY"}, "api_key_env"),
        (
            {**REMOTE, "base_url": "http://127.0.0.1:9999/v1", "api_key_env": "EXAMPLE_API_KEY"},
            "api_key_env",
        ),
        ({**REMOTE, "health_path": "https://evil.test/"}, "health_path"),
        (CUSTOM, "custom"),
        ({**CUSTOM, "model_id": "own", "settings": {"a": 2}}, "custom"),
        (CUSTOM_TOOL, "pool.allow_custom_tools"),
        ({**CUSTOM_TOOL, "tool_id": "own", "settings": {"a": 2}}, "pool.allow_custom_tools"),
        ({**CUSTOM_TOOL, "tool_id": "docs"}, "pool.allow_custom_tools"),
        ({**RETRIEVAL, "corpus": "/"}, "corpus"),
        ({**RETRIEVAL, "corpus": "/proc"}, "corpus"),
        ({**RETRIEVAL, "corpus": "corpora/good"}, "corpus"),
        ({**RETRIEVAL, "corpus": "{}/outside"}, "corpus"),
        ({**RETRIEVAL, "corpus": "{}/corpora/link"}, "corpus"),
        ({**RETRIEVAL, "corpus": "{}/corpora/../outside"}, "corpus"),
        ({**RETRIEVAL, "corpus": "{}/corpora/good", "cache_dir": "/tmp/x"}, "cache_dir"),
        ({**RETRIEVAL, "corpus": "{}/corpora/good", "encoder": {"model": "/etc"}}, "encoder"),
        ({**RETRIEVAL, "corpus": "{}/corpora/good", "max_corpus_bytes": 1 << 40}, "max_corpus"),
        ({**FETCH, "allow": ["10.0.0.5"]}, "allow"),
        ({**FETCH, "ports": [22]}, "ports"),
        ({**FETCH, "max_bytes": 3 << 20}, "max_bytes"),
        ({**FETCH, "tool_id": "inner", "allow": ["wiki.internal", "10.0.0.5"]}, "allow"),
        ({**SEARCH, "base_url": "http://169.254.169.254"}, "base_url"),
        ({**SEARCH, "base_url": "http://127.0.0.1:8265"}, "base_url"),
        ({**SEARCH, "base_url": "http://0x7f000001:9999"}, "base_url"),
        ({**SEARCH, "base_url": "http://api.example.com"}, "base_url"),
        ({**SEARCH, "allow": ["10.0.0.5"]}, "allow"),
        ({**API, "spec": "/etc/passwd"}, "spec"),
        ({**API, "spec": "{}/outside/x.json"}, "spec"),
        ({**API, "spec": "{}/specs/../outside/x.json"}, "spec"),
        ({**API, "spec": "{}/specs/link/x.json"}, "spec"),
        ({**API, "spec": "specs/good.json"}, "spec"),
        ({**API, "server": None}, "server"),
        ({**API, "server": "http://127.0.0.1:8265"}, "server"),
        ({**API, "server": "https://evil.test"}, "server"),
        ({**API, "headers": {"Authorization": "${OTHER_API_KEY}"}}, "headers"),
        ({**API, "headers": {"X": "${HOME}${EXAMPLE_API_KEY}"}}, "headers"),
        (
            {
                **API,
                "server": "http://127.0.0.1:9999",
                "headers": {"X": "${EXAMPLE_API_KEY}"},
            },
            "headers",
        ),
        ({**API, "ports": [6379]}, "ports"),
        # The file's own, with more operations than the file offers, or with other effects.
        ({**FILES_API, "operations": ["read", "delete"]}, "spec"),
        ({**FILES_API, "operations": None}, "spec"),
        ({**FILES_API, "operation_effects": {"read": "none"}}, "spec"),
        *(
            ({**tool, name: path}, name)
            for tool, name in ((SQL, "database"), (FILES, "root"))
            for path in (
                "/proc",
                "corpora/good",
                "{}/outside",
                "{}/corpora/link",
                "{}/corpora/../outside",
                "{}/corpora-too",
                "{}/corpora/good\0",
            )
        ),
        ({**FILES, "root": "/"}, "root"),
        ({**SQL, "database": "{}/corpora/good", "memory_mb": 65536}, "memory_mb"),
        ({**PYTHON, "packages": ["requests"]}, "packages"),
        ({**PYTHON, "packages": ["../x"]}, "packages"),
        ({**PYTHON, "memory_mb": 65536}, "memory_mb"),
        ({**PYTHON, "max_disk_bytes": 1 << 31}, "max_disk_bytes"),
        ({**PYTHON, "max_concurrency": 100_000}, "max_concurrency"),
        ({**PYTHON, "description": "x" * 4001}, "description"),
        ({**PYTHON, "examples": ["x"] * 257}, "examples"),
        (COMMAND, "a command is code"),
        ({**COMMAND, "tool_id": "run", "args": ["-y", "theirs"]}, "a command is code"),
        ({**COMMAND, "tool_id": "run", "args": ["-y", "mine"], "env": {"A": "b"}}, "is code"),
        ({**SERVER, "url": "http://169.254.169.254/mcp"}, "url"),
        ({**SERVER, "url": "https://api.example.com.evil.test/mcp"}, "url"),
        ({**SERVER, "url": "https://user:pass@api.example.com/mcp"}, "url"),
        ({**SERVER, "headers_from": {"authorization": "AWS_SECRET"}}, "headers_from"),
        ({**REMOTE, "card": {"examples": ["x" * 2001]}}, "card.examples"),
        ({**REMOTE, "card": {"examples": ["x"] * 20_000}}, "card.examples"),
    ],
    ids=str,
)
def test_what_the_file_does_not_allow_is_refused_by_name(
    config: AtlasConfig, folders: Path, settings: Json, field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(config, placed(settings, folders))
    assert field in refused.value.message
    assert len(refused.value.message) < 400


def test_commands_are_taken_where_the_file_allows_them(config: AtlasConfig) -> None:
    pool = config.pool.model_copy(update={"allow_commands": True})
    check(config.model_copy(update={"pool": pool}), COMMAND)


@pytest.mark.parametrize(
    "settings",
    [
        LOCAL,
        {**LOCAL, "model_source": "gpt2"},
        {**LOCAL, "model_source": "{}/weights/good"},
        {
            **LOCAL,
            "engine_kwargs": {
                "max_model_len": 4096,
                "gpu_memory_utilization": 0.9,
                "dtype": "bfloat16",
                "enable_prefix_caching": True,
                "quantization": "compressed-tensors",
                "tool_call_parser": "llama3_json",
                "revision": COMMIT,
            },
        },
        {
            **LOCAL,
            "model_id": "odd",
            "model_source": "org/odd",
            "env": {"A": "b"},
            "engine_kwargs": {
                "trust_remote_code": True,
                "revision": COMMIT,
                "code_revision": COMMIT,
            },
            "max_ongoing_requests": 3,
        },
        REMOTE,
        {**REMOTE, "base_url": "https://API.EXAMPLE.COM/v1"},
        {**REMOTE, "base_url": "https://api.example.com:443/v1/", "api_key_env": "EXAMPLE_API_KEY"},
        {**REMOTE, "base_url": "http://127.0.0.1:9999/v1", "health_path": None},
        {
            **REMOTE,
            "model_id": "far",
            "base_url": "http://u:p@elsewhere/v1",
            "api_key_env": "X",
            "remote_model": "other",
        },
        {**CUSTOM, "model_id": "own", "settings": {"a": 1}, "max_ongoing_requests": 3},
        {**CUSTOM_TOOL, "tool_id": "own", "settings": {"a": 1}, "timeout_s": 3.0},
        {"type": "toolset", "tool_id": "new", "description": "x", "members": ["own"]},
        {**RETRIEVAL, "corpus": "{}/corpora/good"},
        {**RETRIEVAL, "corpus": "{}/corpora/good", "encoder": None},
        {
            **RETRIEVAL,
            "tool_id": "docs",
            "corpus": "/srv/docs",
            "cache_dir": "/srv/cache",
            "top_k": 9,
        },
        {**SQL, "database": "{}/corpora/good/shop.db"},
        {**FILES, "root": "{}/corpora/good"},
        {**PYTHON, "packages": ["numpy"], "memory_mb": 1024},
        FETCH,
        {**FETCH, "tool_id": "inner", "allow": ["wiki.internal"], "timeout_s": 5},
        SEARCH,
        {**SEARCH, "base_url": "http://127.0.0.1:9999/searxng"},
        API,
        {**API, "headers": {"Authorization": "Bearer ${EXAMPLE_API_KEY}", "X-Client": "atlas"}},
        {**FILES_API, "max_result_chars": 100},
        {**COMMAND, "tool_id": "run", "args": ["-y", "mine"], "top_k": 2},
        {**SERVER, "headers_from": {"authorization": "EXAMPLE_API_KEY"}},
        {"type": "calculator", "tool_id": "new"},
        {"type": "best_of", "tool_id": "new", "num_samples": 3},
    ],
    ids=str,
)
def test_what_the_file_allows_or_says_itself_is_taken(
    config: AtlasConfig, folders: Path, settings: Json
) -> None:
    check(config, placed(settings, folders))


def test_a_file_that_allows_nothing_special_allows_no_address_folder_or_package() -> None:
    bare = AtlasConfig.model_validate({"models": [LOCAL]})
    check(bare, {**LOCAL, "model_id": "second"})
    for settings in (
        {**LOCAL, "model_source": "/srv/weights"},
        {**REMOTE, "model_id": "second"},
        {**RETRIEVAL, "corpus": "/srv/corpus"},
        {**SQL, "database": "/srv/shop.db"},
        {**FILES, "root": "/srv/files"},
        {**PYTHON, "packages": ["numpy"]},
        SEARCH,
        {**API, "spec": "/srv/specs/x.json"},
    ):
        with pytest.raises(InvalidRequest):
            check(bare, settings)


def test_the_arguments_allowed_by_default_are_vllms_own() -> None:
    from vllm import AsyncEngineArgs

    # vLLM's front end has these three, and Ray passes them on.
    front_end = {"enable_auto_tool_choice", "reasoning_parser", "tool_call_parser"}
    known = set(AsyncEngineArgs.__dataclass_fields__)
    assert set(SAFE_ENGINE_KWARGS) - front_end <= known
    assert list(SAFE_ENGINE_KWARGS) == sorted(set(SAFE_ENGINE_KWARGS))


@pytest.mark.parametrize(
    "allowed",
    [
        {"engine_kwargs": ["max_model_len", "trust_remote_code"]},
        {"engine_kwargs": ["worker_cls"]},
        {"corpora_root": "/"},
        {"corpora_root": "corpora"},
        {"specs_root": "/"},
        {"model_roots": ["/"]},
        {"remotes": [{"origin": "https://api.example.com/v1"}]},
        {"remotes": [{"origin": "file:///etc"}]},
    ],
    ids=str,
)
def test_a_file_cannot_allow_code_or_the_whole_disk(allowed: Json) -> None:
    with pytest.raises(ValidationError):
        AtlasConfig.model_validate({"models": [LOCAL], "pool": {"admin_api": allowed}})


@pytest.mark.parametrize(
    ("settings", "is_fine"),
    [
        ({"trust_remote_code": True}, False),
        ({"trust_remote_code": True, "revision": "main", "code_revision": "main"}, False),
        ({"trust_remote_code": True, "revision": COMMIT}, False),
        ({"trust_remote_code": True, "revision": COMMIT, "code_revision": COMMIT}, True),
        ({"trust_remote_code": True, "revision": "${A}", "code_revision": "${A}"}, True),
        ({"trust_remote_code": False}, True),
    ],
    ids=str,
)
def test_code_of_the_hub_runs_only_at_a_named_commit(settings: Json, is_fine: bool) -> None:
    whole = {"models": [{**LOCAL, "engine_kwargs": settings}]}
    if is_fine:
        AtlasConfig.model_validate(whole)
    else:
        with pytest.raises(ValidationError, match="revision"):
            AtlasConfig.model_validate(whole)
    folder = {**LOCAL, "model_source": "/srv/weights", "engine_kwargs": settings}
    AtlasConfig.model_validate({"models": [folder]})


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(f"sqlite+aiosqlite:///{tmp_path / 'atlas.db'}")
    yield opened
    await opened.close()


async def test_what_the_store_holds_is_held_to_the_same_rules(
    config: AtlasConfig, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A revision written by somebody else, or admitted by a file that allowed more."""
    pool = DesiredPool(config, store)
    await pool.apply_file()
    allowed = RemoteModelConfig.model_validate(
        {**REMOTE, "tools": ["none", "docs"], "model_id": "fine"}
    )
    await pool.add_model(allowed)
    newest = await newest_pool(store)
    assert newest is not None
    evil = {**LOCAL, "model_id": "evil", "env": {"LD_PRELOAD": "/tmp/x.so"}}
    reader = {**RETRIEVAL, "tool_id": "reader", "corpus": "/etc", "kind": "context"}
    written = await add_pool(
        store,
        newest.revision + 1,
        models=(*newest.models, {**allowed.model_dump(mode="json"), "model_id": "with-reader",
                                 "tools": ["none", "reader"]}, {**evil, "tools": ["none"]}),
        tools=(*newest.tools, reader, {**CUSTOM_TOOL, "tool_id": "spy"}),
        from_file=newest.from_file,
        change="not by the admin API",
    )  # fmt: skip
    assert written is not None
    with caplog.at_level(logging.ERROR):
        for read in (pool.of(written), await pool.current()):
            assert [m.model_id for m in read.models] == ["odd", "far", "own", "fine", "with-reader"]
            assert [t.tool_id for t in read.tools] == ["docs", "own", "inner", "crm", "run"]
            assert read.model("with-reader").tools == ("none",)
    assert "'evil' is left out of the pool: env" in caplog.text
    narrower = AtlasConfig.model_validate({**config.model_dump(mode="json"), "pool": {}})
    assert "fine" not in {m.model_id for m in DesiredPool(narrower, store).of(written).models}


async def test_where_only_refused_models_are_left_the_files_own_are_used(store: Store) -> None:
    wide = AtlasConfig.model_validate(
        {"models": [LOCAL], "pool": {"admin_api": {"remotes": [{"origin": "http://127.0.0.1:9"}]}}}
    )
    pool = DesiredPool(wide, store)
    await pool.apply_file()
    remote = {**REMOTE, "model_id": "far", "base_url": "http://127.0.0.1:9/v1"}
    await pool.add_model(RemoteModelConfig.model_validate(remote))
    await pool.remove_model("new")
    assert [m.model_id for m in (await pool.current()).models] == ["far"]
    narrow = AtlasConfig.model_validate({"models": [LOCAL]})
    assert [m.model_id for m in (await DesiredPool(narrow, store).current()).models] == ["new"]


def test_the_admin_api_refuses_with_a_400_and_changes_nothing(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        url = f"{gateway.url}/v1/admin"
        for path, body in (
            ("models", {**LOCAL, "env": {"PYTHONPATH": "/tmp"}}),
            ("models", {**REMOTE, "base_url": "http://169.254.169.254/v1"}),
            ("models", CUSTOM),
            ("tools", {"tool": {**RETRIEVAL, "corpus": "/"}}),
        ):
            answer = httpx2.post(f"{url}/{path}", json=body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["type"] == "invalid_request_error"
        changed = httpx2.put(f"{url}/models/small", json={**REMOTE, "model_id": "small"})
        assert changed.status_code == 400
        assert gateway.run(lambda: newest_pool(gateway.store)) is None
