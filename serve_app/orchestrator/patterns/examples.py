"""A program that tries an answer's code on the examples of a question."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass

from serve_app.tools.base import NO_OUTPUT
from serve_app.tools.reports import code_of, trials_in

_MAX_FAULTS = 4
_MARK = "atlas-examples"

_HARNESS = """
import io as _io, json as _json, sys as _sys, types as _types
_said, _code, _examples, _out = [], {code!r}, {examples!r}, _sys.stdout
_module = _sys.modules["answer"] = _types.ModuleType("answer")
_space = vars(_module)
class _Unheard(_io.TextIOBase):
    def write(self, text):
        return len(text)
_sys.stdout = _Unheard()
try:
    exec(compile(_code, "<answer>", "exec"), _space)
except BaseException as _error:
    _said.append("the code fails: " + type(_error).__name__ + ": " + str(_error)[:200])
else:
    for _call, _value in _examples:
        try:
            _got = eval(_call, _space)
            if _value is None:
                continue
            _want = eval(_value, _space)
            _near = isinstance(_got, float) and isinstance(_want, (int, float))
            if not (abs(_got - _want) <= 1e-6 * max(1.0, abs(_want)) if _near else _got == _want):
                _wrong = " returned " + repr(_got)[:200] + ", expected " + _value[:200]
                _said.append(_call[:200] + _wrong)
        except BaseException as _error:
            _want = "" if _value is None else ", expected " + _value[:200]
            _wrong = " raised " + type(_error).__name__ + ": " + str(_error)[:200] + _want
            _said.append(_call[:200] + _wrong)
_out.write("\\n{mark} " + _json.dumps(_said[:{most}]) + "\\n")
_out.flush()  # at its end, the sandbox flushes what is `sys.stdout` then
"""


@dataclass(frozen=True)
class Trial:
    """A program that tries code on examples, and how its verdict is told."""

    program: str
    mark: str

    def failures(self, said: str) -> str | None:
        """What is wrong, by what the program said; `None`: nothing.

        Args:
            said: Its output, or why it ended without one.
        """
        for line in reversed(said.splitlines()):
            if line.startswith(self.mark):
                try:
                    faults = json.loads(line.removeprefix(self.mark))
                except ValueError:
                    return "it fails more examples than there is room for"
                return "; ".join(faults) or None
        said = said.strip()[:500]
        return said if said not in ("", NO_OUTPUT) else "the code ended without a result"


def trial_of(answer: str, question: str) -> Trial | None:
    """The program that tries an answer's code; `None`: the question has no example.

    What counts as one, and what each must do: see `reports.trials_in`.
    """
    code = code_of(answer)
    trials = trials_in(question, code)
    if not trials:
        return None
    mark = f"{_MARK}-{secrets.token_hex(8)}"
    program = _HARNESS.format(code=code, examples=trials, mark=mark, most=_MAX_FAULTS)
    return Trial(program, mark)
