"""The debug tool: runs faulty code in the sandbox and says what is wrong with it, and where."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any, ClassVar

from serve_app.config.tools import DebugConfig
from serve_app.tools.base import Tool, ToolResult
from serve_app.tools.builtin.debug_engine import Trial, finding
from serve_app.tools.builtin.python import MAX_CODE_CHARS, failure
from serve_app.tools.reports import ErrorType, code_in, error_said, trials_in
from serve_app.tools.sandbox.client import SandboxLimits, sandbox_server

ENGINE = Path(__file__).with_name("debug_engine.py")
_CODE_SHARE = 0.7
"""Most of the time of a call that the code may take: the rest is for saying what did not finish."""
_MAX_LOCALS_CHARS = 400
_OF_THE_SANDBOX = frozenset({"ModuleNotFoundError", "FileNotFoundError", "EOFError", "SystemError"})
"""What code may raise here because of what the sandbox lacks: packages, files, a keyboard."""


class DebugTool(Tool):
    """Compiles `code`, runs it, and tries what `report` says of it.

    Nothing outlives a call: the tool has no effects.
    """

    config: DebugConfig

    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "code": {
                "type": "string",
                "description": "Python source, or a text with a block of it.",
                "minLength": 1,
                "maxLength": MAX_CODE_CHARS,
            },
            "report": {
                "type": "string",
                "description": "What is wrong: an error message, a failing call, an example.",
                "maxLength": MAX_CODE_CHARS,
            },
        },
        "required": ["code"],
        "additionalProperties": False,
    }

    def warm(self) -> None:
        """Start the sandbox server."""
        sandbox_server((), str(ENGINE)).start()

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Say what is wrong with `code`.

        Args:
            arguments: `code` and `report`.
            deadline_s: Seconds until it is killed.

        Returns:
            What is wrong in words; `data` has the finding (see `debug_engine.examine`), `code`, the
            code that was run, and `triage`, the kind of error by `triage_of`. Code that takes too
            long or ends the interpreter is a finding.

        Raises:
            ToolFailed: If the sandbox is not available.
        """
        code = code_in(arguments["code"])
        if not code.strip():
            return ToolResult("There is no code in it.", finding("none") | {"code": ""})
        report = arguments.get("report", "")
        found = self._examined(code, trials_in(report, code), deadline_s)
        data = found | {"code": code.strip("\n"), "triage": triage_of(found, report)}
        return ToolResult(self.clip(told(found)), data)

    def _examined(self, code: str, trials: list[Trial], deadline_s: float) -> dict[str, Any]:
        config, mark = self.config, f"atlas-debug-{secrets.token_hex(8)}"
        seconds = min(config.code_seconds, _CODE_SHARE * deadline_s)
        said = sandbox_server((), str(ENGINE)).run(
            f"import {ENGINE.stem}\n"
            f"{ENGINE.stem}.main({code!r}, {trials!r}, {seconds!r}, {mark!r})",
            SandboxLimits(memory_mb=config.memory_mb, cpu_seconds=config.cpu_seconds),
            deadline_s,
        )
        for line in reversed(said.stdout.splitlines()):
            if line.startswith(mark):
                found: dict[str, Any] = json.loads(line.removeprefix(mark))
                return found
        if said.timed_out:
            return finding("runtime", "TimeoutError", "it did not finish")
        return finding("runtime", "SystemError", failure(said))


def triage_of(found: dict[str, Any], report: str) -> ErrorType:
    """The kind of error: by what the code does, else by what the report says, else logic.

    Args:
        found: As `debug_engine.examine` gives it.
        report: What somebody wrote of the code.
    """
    if found["kind"] in ("syntax", "logic"):
        return "syntax" if found["kind"] == "syntax" else "logic"
    said = error_said(report)
    if found["kind"] == "runtime":
        is_sure = found["error"] not in _OF_THE_SANDBOX or found["error"] in report
        return "runtime" if is_sure or said is None else said
    return said or "logic"


def told(found: dict[str, Any]) -> str:
    """A finding in words: what failed, then the line and the locals of an exception.

    Args:
        found: As `debug_engine.examine` gives it.
    """
    call, expected = found["call"], found["expected"]
    wanted = f", expected {expected}" if expected else ""
    error = f"{found['error']}: {found['message']}"
    lines = []
    match found["kind"]:
        case "syntax":
            lines.append(f"{error} (line {found['line']})")
        case "runtime":
            lines.append(f"{call} raised {error}{wanted}" if call else error)
        case "logic":
            lines.append(f"{call} returned {found['got']}{wanted}")
        case _:
            is_call = call.endswith(")")
            lines.append(f"{call} returned {found['got']}" if is_call else "Nothing fails.")
    if found["source"]:
        lines.append(f"Line {found['line']}: {found['source']}")
    if found["locals"]:
        names = ", ".join(f"{name} = {value}" for name, value in found["locals"].items())
        lines.append(f"Locals: {names}"[:_MAX_LOCALS_CHARS])
    return "\n".join(lines)
