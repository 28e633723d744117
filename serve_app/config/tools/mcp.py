"""Settings of tools of an MCP server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve_app.config.tools.base import MAX_DESCRIPTION_CHARS, ManyFunctionsSettings
from serve_app.schemas import Effects

_EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
_HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}$")]
_HeaderValue = Annotated[str, Field(pattern=r"^[\x20-\x7e]*$", max_length=4096)]
_Word = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=4096)]


class McpFunctionConfig(BaseModel):
    """What is said of one function of a server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    effects: Effects
    """What a call of it does to the world."""


class McpSandboxConfig(BaseModel):
    """Confines a command: it sees these paths and the system's programs, and no network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    read: tuple[Path, ...] = Field(default=(), max_length=64)
    """Files and folders it may read, absolute; also where the command itself is."""

    write: tuple[Path, ...] = Field(default=(), max_length=64)
    """Files and folders it may read and write, absolute."""

    @model_validator(mode="after")
    def _paths_are_absolute(self) -> Self:
        for path in (*self.read, *self.write):
            if not path.is_absolute() or path == Path(path.root):
                raise ValueError(
                    f"sandbox: {str(path)!r} is no path to allow; name an absolute one"
                )
        return self


class McpConfig(ManyFunctionsSettings):
    """The functions of an MCP server, started as a command or reached by URL.

    A command is code: it comes from the configuration file, or from an admin where
    `pool.allow_commands` is set.
    """

    type: Literal["mcp"] = "mcp"
    kind: Literal["function"] = "function"
    description: str = Field(
        default="Call the functions of a server.", max_length=MAX_DESCRIPTION_CHARS
    )
    effects: Effects = Effects.ONCE
    """What a call does to the world, unless `functions` says it of the function."""

    command: _Word | None = Field(default=None, min_length=1)
    """Program of a server that speaks over its standard input and output."""

    args: tuple[_Word, ...] = Field(default=(), max_length=256)
    """Arguments of the command."""

    env: dict[_EnvName, _Word] = Field(default_factory=dict, max_length=256)
    """The command's environment. Beside it the command gets `PATH`, `HOME` and `LANG`, and nothing
    of this process's own."""

    env_from: dict[_EnvName, _EnvName] = Field(default_factory=dict, max_length=256)
    """Secrets of the command's environment: its variable to the one of ours that has the value."""

    cwd: Path | None = None
    """The command's folder; `None`: the home folder."""

    sandbox: McpSandboxConfig | None = None
    """Confines the command; `None`: it may do what the user of the Ray node may."""

    url: str | None = Field(default=None, pattern=r"^https?://[^\s@?#]+$", max_length=2048)
    """Address of a server that speaks Streamable HTTP."""

    headers: dict[_HeaderName, _HeaderValue] = Field(default_factory=dict, max_length=64)
    """Sent with every request to the address."""

    headers_from: dict[_HeaderName, _EnvName] = Field(default_factory=dict, max_length=64)
    """Secret headers: name to the environment variable that has the whole value."""

    only: tuple[Annotated[str, Field(min_length=1, max_length=128)], ...] | None = Field(
        default=None, min_length=1, max_length=512
    )
    """Functions that may be offered, by the server's own names; `None`: all."""

    functions: dict[str, McpFunctionConfig] = Field(default_factory=dict, max_length=512)
    """What is said of single functions, by the server's own names."""

    timeout_s: float = Field(default=30.0, gt=0, le=3600)
    """Longest run of one call, in seconds; a caller's shorter deadline wins."""

    @model_validator(mode="after")
    def _names_one_server(self) -> Self:
        if (self.command is None) == (self.url is None):
            raise ValueError("name either a command or a url")
        if self.command is None and any(
            (self.args, self.env, self.env_from, self.cwd, self.sandbox)
        ):
            raise ValueError("args, env, env_from, cwd and sandbox go with a command")
        if self.url is None and (self.headers or self.headers_from):
            raise ValueError("headers and headers_from go with a url")
        for kind, plain, secret in (
            ("env", self.env, self.env_from),
            ("headers", self.headers, self.headers_from),
        ):
            twice = set(plain) & set(secret)
            if twice:
                raise ValueError(f"{kind}: {min(twice)!r} has two values")
        if self.only is not None and (unknown := set(self.functions) - set(self.only)):
            raise ValueError(f"functions: {min(unknown)!r} is not among 'only'")
        return self
