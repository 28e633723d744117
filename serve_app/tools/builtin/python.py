"""The Python tool: a model's code, run by a real CPython in the sandbox."""

from __future__ import annotations

import signal
from typing import Any, ClassVar

from serve_app.config.tools import PythonConfig
from serve_app.errors import ToolRetry, ToolTimeout
from serve_app.tools.base import NO_OUTPUT, Tool, ToolResult
from serve_app.tools.sandbox.client import SandboxLimits, SandboxResult, run_python, sandbox_server

MAX_CODE_CHARS = 100_000

_STOPPED = {
    "files": "the code made more files than it may",
    "disk": "the code wrote more to disk than it may",
    "threads": "the code started more threads than it may",
    "uncounted": "the code made files or folders that cannot be counted",
}


class PythonTool(Tool):
    """Runs `code` as a program of its own; what it prints is the result."""

    config: PythonConfig

    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "code": {
                "type": "string",
                "description": "Python source. Print the result, or end with an expression.",
                "minLength": 1,
                "maxLength": MAX_CODE_CHARS,
            }
        },
        "required": ["code"],
        "additionalProperties": False,
    }

    @property
    def limits(self) -> SandboxLimits:
        """What one run may use."""
        config = self.config
        return SandboxLimits(
            memory_mb=config.memory_mb,
            cpu_seconds=config.cpu_seconds,
            max_threads=config.max_threads,
            max_output_bytes=config.max_output_bytes,
            max_file_bytes=config.max_file_bytes,
            max_disk_bytes=config.max_disk_bytes,
            max_files=config.max_files,
            max_open_files=config.max_open_files,
        )

    def warm(self) -> None:
        """Start the sandbox server."""
        sandbox_server(self.config.packages).start()

    def run(self, arguments: dict[str, Any], deadline_s: float) -> ToolResult:
        """Run `code`.

        Args:
            arguments: `code`.
            deadline_s: Seconds until it is killed.

        Returns:
            Its output; `data` has stdout, stderr, exit code and whether output was cut.

        Raises:
            ToolRetry: If the code failed; the message ends with the error's last line.
            ToolTimeout: If it ran out of time.
            ToolFailed: If the sandbox is not available.
        """
        result = run_python(
            arguments["code"], self.limits, deadline_s, packages=self.config.packages
        )
        if result.timed_out:
            raise ToolTimeout(f"the code did not finish in {deadline_s:.3g} s")
        if result.stopped_by in _STOPPED:
            raise ToolRetry(_STOPPED[result.stopped_by])
        if result.exit_code != 0 and not result.truncated:
            raise ToolRetry(failure(result))
        text = result.stdout.rstrip("\n")
        if result.truncated:
            text += "\n[output cut]"
        data = {
            "stdout": result.stdout,
            "stderr": result.stderr,
            "exit_code": result.exit_code,
            "truncated": result.truncated,
        }
        return ToolResult(self.clip(text or NO_OUTPUT), data)


def failure(result: SandboxResult) -> str:
    """Say in one line why code failed.

    Args:
        result: A run that ended with an error.

    Returns:
        The line of the traceback that names the error, with the line of code it came from.
    """
    if result.exit_code < 0:
        try:
            name = signal.Signals(-result.exit_code).name
        except ValueError:  # a real-time signal
            name = f"signal {-result.exit_code}"
        return f"the code crashed ({name}); it may have used too much memory or disk"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if not lines:
        return f"the code ended with exit status {result.exit_code}"
    places = [line.strip() for line in lines if line.startswith('  File "<python>"')]
    where = places[-1].partition(", ")[2] if places else ""
    return f"{lines[-1][:500]}" + (f" ({where})" if where else "")
