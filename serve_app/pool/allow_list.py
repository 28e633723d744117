"""What models and tools may name that do not come from the configuration file.

Settings come in, over HTTP or out of the store; what would run code, read a file or send a secret
beyond what the file allows is refused by the setting's name. Nothing is resolved or connected to
here but symbolic links of folders: an allowed host is allowed whatever its name stands for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from serve_app.config import (
    AtlasConfig,
    CustomModelConfig,
    LocalModelConfig,
    ModelConfig,
    RemoteModelConfig,
)
from serve_app.config.patterns.check import functions_of
from serve_app.config.patterns.language import PatternConfig
from serve_app.config.tools import (
    CustomToolConfig,
    EncoderConfig,
    FilesConfig,
    McpConfig,
    OpenApiConfig,
    PythonConfig,
    RetrievalConfig,
    SqlConfig,
    ToolConfig,
    WebSearchConfig,
    WebSettings,
)
from serve_app.errors import InvalidRequest

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_PLAIN_URL = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+(/[A-Za-z0-9._~/-]*)?")
"""Without a user, a query, or anything that two readers could read in two ways."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MIB = 1 << 20
_SHOWN_CHARS = 100
_SERVER = (
    "command", "args", "env", "env_from", "cwd", "sandbox", "url", "headers", "headers_from"
)  # fmt: skip
"""What says which server the functions of a tool are."""


class AllowList:
    """What one configuration file allows."""

    def __init__(self, config: AtlasConfig) -> None:
        """Of a deployment.

        Args:
            config: As in its file.
        """
        self._rules = config.pool.admin_api
        self._allows_custom = config.pool.allow_custom_models
        self._allows_custom_tools = config.pool.allow_custom_tools
        self._allows_commands = config.pool.allow_commands
        self._encoders = {config.embedder.model, EncoderConfig().model}
        self._models = {model.model_id: model for model in config.models}
        self._tools = {tool.tool_id: tool for tool in config.tools}
        self._patterns = {pattern.name: pattern for pattern in config.patterns}

    def check_pattern(self, pattern: PatternConfig) -> None:
        """See that a pattern names no Python function but those of the file's own.

        Raises:
            InvalidRequest: If it does.
        """
        of_file = self._patterns.get(pattern.name)
        allowed = set() if of_file is None else functions_of(of_file)
        named = functions_of(pattern) - allowed
        if named:
            raise InvalidRequest(
                f"parallel.function: {min(named)!r} is code; only the configuration file can name "
                "it",
                "do",
            )

    def check_model(self, model: ModelConfig) -> None:
        """See that a model names nothing that is not allowed.

        Raises:
            InvalidRequest: If it does; the message names the setting.
        """
        of_file = self._models.get(model.model_id)
        if isinstance(model, LocalModelConfig):
            if not _same(model, of_file, "model_source", "engine_kwargs", "env"):
                self._check_local(model)
        elif isinstance(model, RemoteModelConfig):
            if not _same(model, of_file, "base_url", "api_key_env"):
                self._check_remote(model)
        elif not self._allows_custom and not _same(model, of_file, "import_path", "settings"):
            assert isinstance(model, CustomModelConfig)
            raise InvalidRequest(
                "a custom model runs code: it is added in the configuration file, or where "
                "pool.allow_custom_models is set",
                "type",
            )

    def check_tool(self, tool: ToolConfig) -> None:
        """See that a tool names nothing that is not allowed.

        Raises:
            InvalidRequest: If it does; the message names the setting.
        """
        of_file = self._tools.get(tool.tool_id)
        if isinstance(tool, RetrievalConfig):
            names = ("corpus", "cache_dir", "encoder", "max_corpus_bytes")
            if not _same(tool, of_file, *names):
                self._check_retrieval(tool)
        elif isinstance(tool, PythonConfig):
            if not _same(tool, of_file, "packages", "memory_mb", "max_disk_bytes"):
                self._check_python(tool)
        elif isinstance(tool, CustomToolConfig):
            if not (self._allows_custom_tools or _same(tool, of_file, "import_path", "settings")):
                raise InvalidRequest(
                    "a custom tool runs code: it is added in the configuration file, or where "
                    "pool.allow_custom_tools is set",
                    "tool.type",
                )
        elif isinstance(tool, WebSettings):
            if not _same(tool, of_file, *_of_the_web(tool)):
                self._check_web(tool)
        elif isinstance(tool, SqlConfig):
            if not _same(tool, of_file, "database", "memory_mb"):
                self._check_below_root("database", tool.database)
                self._check_size("memory_mb", tool.memory_mb)
        elif isinstance(tool, FilesConfig):
            if not _same(tool, of_file, "root"):
                self._check_below_root("root", tool.root)
        elif isinstance(tool, McpConfig) and not _same(tool, of_file, *_SERVER):
            self._check_server(tool)

    def is_of_file(self, tool: McpConfig) -> bool:
        """Whether the file itself names the server of a tool."""
        return _same(tool, self._tools.get(tool.tool_id), *_SERVER)

    def _check_local(self, model: LocalModelConfig) -> None:
        if model.env:
            raise InvalidRequest(
                "env: only the configuration file sets environment variables of an engine", "env"
            )
        for name, value in model.engine_kwargs.items():
            field = f"engine_kwargs.{name}"[:_SHOWN_CHARS]
            if name not in self._rules.engine_kwargs:
                raise InvalidRequest(
                    f"{field}: not among the arguments that may be set here; set it in the "
                    "configuration file, or allow its name in pool.admin_api.engine_kwargs",
                    field,
                )
            is_plain = value is None or isinstance(value, (bool, int, float))
            if not is_plain and not (isinstance(value, str) and _WORD.fullmatch(value)):
                raise InvalidRequest(
                    f"{field}: {_shown(value)} is no number, truth value or plain word; anything "
                    "else is set in the configuration file",
                    field,
                )
        source = model.model_source
        if not source.startswith(("/", ".")) and _HUB_ID.fullmatch(source):
            return
        if not any(_lies_below(source, root) for root in self._rules.model_roots):
            raise InvalidRequest(
                f"model_source: {_shown(source)} is neither a hub id nor the absolute path of a "
                "folder below one of pool.admin_api.model_roots",
                "model_source",
            )

    def _check_remote(self, model: RemoteModelConfig) -> None:
        keys = self._keys_of(model.base_url, "base_url")
        if model.api_key_env is not None and model.api_key_env not in keys:
            raise InvalidRequest(
                f"api_key_env: {_shown(model.api_key_env)} is no key for this address; "
                "pool.admin_api.remotes of the configuration file says which key is sent where",
                "api_key_env",
            )

    def _check_retrieval(self, tool: RetrievalConfig) -> None:
        if tool.cache_dir is not None:
            raise InvalidRequest(
                "cache_dir: only the configuration file names it", "tool.cache_dir"
            )
        self._check_below_root("corpus", tool.corpus)
        if tool.encoder is not None and tool.encoder.model not in self._encoders:
            raise InvalidRequest(
                f"encoder.model: {_shown(tool.encoder.model)} is not allowed here; known are "
                f"{sorted(self._encoders)}",
                "tool.encoder.model",
            )
        longest = int(RetrievalConfig.model_fields["max_corpus_bytes"].default)
        if tool.max_corpus_bytes > longest:
            raise InvalidRequest(
                f"max_corpus_bytes: {tool.max_corpus_bytes} is above {longest}; more is set in the "
                "configuration file",
                "tool.max_corpus_bytes",
            )

    def _check_below_root(self, name: str, path: Path) -> None:
        root = self._rules.corpora_root
        if root is None or not _lies_below(str(path), root):
            raise InvalidRequest(
                f"{name}: {_shown(str(path))} is not allowed here; put it below the folder that "
                "pool.admin_api.corpora_root of the configuration file names, and give its "
                "absolute path",
                f"tool.{name}",
            )

    def _check_python(self, tool: PythonConfig) -> None:
        for package in tool.packages:
            if package not in self._rules.python_packages:
                raise InvalidRequest(
                    f"packages: {package!r} is not among pool.admin_api.python_packages of the "
                    "configuration file",
                    "tool.packages",
                )
        self._check_size("memory_mb", tool.memory_mb)
        self._check_size("max_disk_bytes", tool.max_disk_bytes / _MIB)

    def _check_size(self, name: str, size_mb: float) -> None:
        largest = self._rules.max_sandbox_mb
        if size_mb > largest:
            raise InvalidRequest(
                f"{name}: {size_mb:g} MiB is above pool.admin_api.max_sandbox_mb, {largest}",
                f"tool.{name}",
            )

    def _check_web(self, tool: WebSettings) -> None:
        for name in ("allow", "ports"):
            if getattr(tool, name) != WebSettings.model_fields[name].default:
                raise InvalidRequest(
                    f"{name}: only the configuration file names it", f"tool.{name}"
                )
        longest = int(WebSettings.model_fields["max_bytes"].default)
        if tool.max_bytes > longest:
            raise InvalidRequest(
                f"max_bytes: {tool.max_bytes} is above {longest}; more is set in the configuration "
                "file",
                "tool.max_bytes",
            )
        if isinstance(tool, WebSearchConfig):
            self._keys_of(tool.base_url, "tool.base_url")
        elif isinstance(tool, OpenApiConfig):
            self._check_openapi(tool)

    def _check_openapi(self, tool: OpenApiConfig) -> None:
        root = self._rules.specs_root
        if root is None or not _lies_below(str(tool.spec), root):
            raise InvalidRequest(
                f"spec: {_shown(str(tool.spec))} is not allowed here; put it below the folder that "
                "pool.admin_api.specs_root of the configuration file names, and give its absolute "
                "path",
                "tool.spec",
            )
        if tool.server is None:
            raise InvalidRequest("server: a tool that is added here names it", "tool.server")
        foreign = sorted(tool.environment_names() - self._keys_of(tool.server, "tool.server"))
        if foreign:
            raise InvalidRequest(
                f"headers: {_shown(foreign[0])} is no key for this address; "
                "pool.admin_api.remotes of the configuration file says which key is sent where",
                "tool.headers",
            )

    def _keys_of(self, url: str, field: str) -> frozenset[str]:
        """The environment variables whose keys may be sent to an address.

        Raises:
            InvalidRequest: If the address is not among those that the file lists.
        """
        origin = _origin(url)
        keys = {r.api_key_env for r in self._rules.remotes if _origin(r.origin) == origin}
        if origin is None or not keys:
            raise InvalidRequest(
                f"{field.rpartition('.')[2]}: this address is not allowed here; name its scheme, "
                "host and port in pool.admin_api.remotes of the configuration file",
                field,
            )
        return frozenset(key for key in keys if key is not None)

    def _check_server(self, tool: McpConfig) -> None:
        if tool.url is None:
            if not self._allows_commands:
                raise InvalidRequest(
                    "a command is code: it is added in the configuration file, or where "
                    "pool.allow_commands is set",
                    "tool.command",
                )
            return
        keys = self._keys_of(tool.url, "tool.url")
        for name in tool.headers_from.values():
            if name not in keys:
                raise InvalidRequest(
                    f"headers_from: {_shown(name)} is no key for this address; "
                    "pool.admin_api.remotes of the configuration file says which key is sent where",
                    "tool.headers_from",
                )


def _of_the_web(tool: WebSettings) -> tuple[str, ...]:
    """The settings of a tool that say where it connects to, and with what."""
    names: tuple[str, ...] = ("allow", "ports", "max_bytes")
    if isinstance(tool, WebSearchConfig):
        return (*names, "base_url")
    if isinstance(tool, OpenApiConfig):
        return (*names, "spec", "server", "headers", "operations", "operation_effects")
    return names


def _same(member: BaseModel, of_file: BaseModel | None, *names: str) -> bool:
    """Whether the file gives the same member the same values, all of them together."""
    if type(of_file) is not type(member) or of_file is None:
        return False

    def values(of: BaseModel) -> dict[str, Any]:
        return of.model_dump(mode="json", include=set(names))

    return values(member) == values(of_file)


def _lies_below(path: str, root: Path) -> bool:
    """Whether an absolute path lies below a folder, its symbolic links followed."""
    if "\0" in path or not path.startswith("/"):
        return False
    try:
        return Path(path).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a name that is too long, or a loop of links
        return False


def _origin(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of a plain URL; `None` of any other."""
    if not _PLAIN_URL.fullmatch(url):
        return None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    return (parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme]) if host else None


def _shown(value: object) -> str:
    return repr(value)[:_SHOWN_CHARS]
