"""Runs faulty code and says what is wrong with it, inside the sandbox.

Standard library only: the sandbox server loads this file by its path, before it forks the runs
that call `main`. Comes in: code and what to try on it. Goes out: one finding, the first failure.
"""

from __future__ import annotations

import io
import json
import reprlib
import signal
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

FILE_NAME = "<code>"
"""Name of the code in tracebacks."""
MAX_LOCALS = 8
_MAX_CHARS = 200
_MAX_SOURCE_CHARS = 160

Trial = tuple[str, str | None]
"""A Python expression and one of what it must equal; `None`: it must only run."""


class OutOfTime(BaseException):
    """The code did not finish."""


class _Unheard(io.TextIOBase):
    """What the code prints is not of interest."""

    def write(self, text: str) -> int:
        return len(text)


def examine(code: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """Compile code, run it, and try it.

    Args:
        code: A Python program, or definitions.
        trials: What to try on it, in order.

    Returns:
        `kind`: `syntax`, `runtime`, `logic`, or `none` where nothing fails. `error` and `message`
        of the exception, its `line` in the code and that line's `source`, the `locals` there by
        name, and of the trial that failed `call`, `got` and `expected`. What does not apply is
        empty, or 0.
    """
    lines = code.split("\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = compile(code, FILE_NAME, "exec")
    except SyntaxError as error:
        message, number = error.msg, error.lineno or 0
        return finding("syntax", type(error).__name__, message, number, _line(lines, number))
    except (ValueError, RecursionError, MemoryError) as error:
        return finding("syntax", type(error).__name__, str(error))
    module = types.ModuleType("__main__")
    space = vars(module)
    heard, sys.stdout = sys.stdout, _Unheard()
    main, sys.modules["__main__"] = sys.modules.get("__main__"), module
    try:
        got: dict[str, Any] = {}
        try:
            exec(compiled, space)
        except SystemExit:
            pass
        except BaseException as error:
            return _raised(error, lines, space)
        for call, value in trials:
            found = _tried(call, value, lines, space)
            if found["kind"] != "none":
                return found
            got = got or found
        return got or finding("none")
    finally:
        sys.stdout = heard
        if main is not None:
            sys.modules["__main__"] = main


def _tried(call: str, value: str | None, lines: list[str], space: dict[str, Any]) -> dict[str, Any]:
    expected = "" if value is None else value[:_MAX_CHARS]
    try:
        got = eval(compile(call, "<trial>", "eval"), space)
        is_right = value is None or _says_the_same(got, eval(value, dict(space)))
    except BaseException as error:
        return _raised(error, lines, space) | {"call": call[:_MAX_CHARS], "expected": expected}
    told = {"call": call[:_MAX_CHARS], "got": _shown(got), "expected": expected}
    return finding("none" if is_right else "logic") | told


def _says_the_same(got: object, wanted: object) -> bool:
    if isinstance(got, float) and isinstance(wanted, int | float):
        return abs(got - wanted) <= 1e-6 * max(1.0, abs(wanted))
    return bool(got == wanted)


def _raised(error: BaseException, lines: list[str], space: dict[str, Any]) -> dict[str, Any]:
    number, names = 0, {}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE_NAME:
            number, names = trace.tb_lineno, trace.tb_frame.f_locals
        trace = trace.tb_next
    if names is space:
        hidden = types.ModuleType | types.FunctionType | type
        names = {name: value for name, value in names.items() if not isinstance(value, hidden)}
    shown = [name for name in names if not name.startswith(("__", "."))][:MAX_LOCALS]
    kind, message = type(error).__name__, _text_of(error)
    if isinstance(error, OutOfTime):
        kind, message = "TimeoutError", "it did not finish"
    found = finding("runtime", kind, message, number, _line(lines, number))
    return found | {"locals": {name: _shown(names[name]) for name in shown}}


def finding(
    kind: str, error: str = "", message: str = "", line: int = 0, source: str = ""
) -> dict[str, Any]:
    """A finding without a trial."""
    return {
        "kind": kind, "error": error, "message": message[:_MAX_CHARS], "line": line,
        "source": source, "locals": {}, "call": "", "got": "", "expected": "",
    }  # fmt: skip


def _line(lines: list[str], number: int) -> str:
    return lines[number - 1].strip()[:_MAX_SOURCE_CHARS] if 0 < number <= len(lines) else ""


def _text_of(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())
    except BaseException:
        return ""


_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = _repr.maxset = _repr.maxdict = 12
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
_repr.maxlevel = 3


def _shown(value: object) -> str:
    """A value of bounded length."""
    try:
        return _repr.repr(value)[:_MAX_CHARS]
    except BaseException:
        return f"<{type(value).__name__}>"


def main(code: str, trials: Sequence[Trial], seconds: float, mark: str) -> None:
    """Examine, and print the finding after a mark that the code cannot know.

    Args:
        code: The program.
        trials: What to try on it.
        seconds: How long all of it may take; what is running then is what did not finish.
        mark: What the line of the finding begins with.
    """

    def stop(number: int, frame: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    found = examine(code, trials)
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout.write(f"\n{mark} {json.dumps(found)}\n")
