"""How users word that their code does not work: reports by the error, and requests around them."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.nano.task import Split
from serve_app.tools.reports import ErrorType

REPORTS: dict[ErrorType, dict[Split, tuple[str, ...]]] = {
    "syntax": {
        "seen": (
            "{error}: {message} (line {line})",
            "{trace}",
            "{trace}",
            "It does not compile: {message}, line {line}.",
            "Python says {message} on line {line}.",
            "I cannot run it: {error} in line {line}.",
            "line {line}: {message}",
        ),
        "held_out": (
            'The interpreter refuses it at line {line} with "{message}".',
            "It will not even start. The message is {error}: {message}.",
            "The parser stops at line {line}.",
        ),
    },
    "runtime": {
        "seen": (
            "{call} raised {error}: {message}",
            "{call} raised {error}: {message}{wanted}",
            "{trace}",
            "{trace}",
            "It crashes with {error}: {message} when I call {call}.",
            "Calling {call} stops with {error}.",
            "When I run {call}, I get {error}: {message}.",
        ),
        "held_out": (
            "It blows up on {call}: {message}.",
            "{call} ends in an exception ({error}{wanted}).",
            "I tried {call} and the program died, saying {message}.",
        ),
    },
    "logic": {
        "seen": (
            "{call} returned {got}, expected {expected}",
            "{call} returned {got}, expected {expected}",
            "{call} gives {got} but should give {expected}.",
            "This test fails:\nassert {call} == {expected}",
            "The doctest fails:\n>>> {call}\n{expected}",
            "For {call} I want {expected}, not {got}.",
            "Wrong result for {call}: {got} instead of {expected}.",
        ),
        "held_out": (
            "{call} comes out as {got}; the right answer is {expected}.",
            "My test wants {expected} from {call} and gets {got}.",
            "The output for {call} is off: {got}, although it should be {expected}.",
        ),
    },
}
REQUESTS: dict[Split, tuple[str, ...]] = {
    "seen": (
        "Fix this code:\n\n{code}\n\n{report}",
        "Fix this code.\n\n{code}\n\nIt fails:\n{report}",
        "{code}\n\n{report}\n\nPlease fix it.",
        "This function does not work:\n\n{code}\n\n{report}",
        "Repair this function.\n{code}\n{report}",
        "My function fails. Mend the code.\n\n{code}\n\n{report}",
        "Find the bug and fix it.\n\n{code}\n\n{report}",
        "{report}\n\n{code}\n\nCorrect the code.",
        "What is wrong here?\n\n{report}\n\n{code}",
        "Debug this:\n{code}\n{report}",
        "Correct this Python function.\n\n{code}\n\nProblem: {report}",
        "Here is my code:\n\n{code}\n\n{report}\n\nWhat is the right code?",
        "Can you repair this?\n\n{code}\n\n{report}",
    ),
    "held_out": (
        "There is a mistake in this code.\n\n{code}\n\n{report}",
        "Why does this fail?\n{report}\n\n{code}",
        "Please patch the function below.\n{report}\n\n{code}",
        "{code}\n\nI do not see what I did wrong. {report}",
        "Help me with a bug: {report}\n\n{code}",
    ),
}
_FILES: dict[Split, tuple[str, ...]] = {
    "seen": ("main.py", "solution.py", "test.py", "<stdin>"),
    "held_out": ("app.py", "task.py"),
}
_UNFENCED_SHARE = 0.2


def report(
    rng: random.Random, split: Split, error: ErrorType, finding: dict[str, Any], code: str
) -> str:
    """What a user says of a fault.

    Args:
        rng: Chooses the wording.
        split: Which wordings.
        error: What kind of error the code has.
        finding: See `debug_engine.examine`.
        code: The faulty code.
    """
    expected = finding["expected"]
    slots = {name: str(value) for name, value in finding.items()}
    slots["wanted"] = f", expected {expected}" if expected else ""
    slots["trace"] = _trace(rng.choice(_FILES[split]), error, finding, code)
    return _filled(rng.choice(REPORTS[error][split]), slots)


def worded(rng: random.Random, split: Split, code: str, said: str) -> str:
    """A request around code, in a fence or not, and what is said of it."""
    shown = code if rng.random() < _UNFENCED_SHARE else f"```python\n{code}\n```"
    return _filled(rng.choice(REQUESTS[split]), {"report": said, "code": shown})


def _filled(text: str, slots: dict[str, str]) -> str:
    """Fill slots once: what fills one is not read for slots again."""
    parts = text.split("{")
    filled = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition("}")
        filled.append(slots[name] + rest)
    return "".join(filled)


def _trace(file: str, error: ErrorType, finding: dict[str, Any], code: str) -> str:
    """The traceback that Python prints."""
    last = f"{finding['error']}: {finding['message']}"
    place = f'  File "{file}", line {finding["line"]}'
    if error == "syntax":
        return f"{place}\n    {finding['source']}\n    ^\n{last}"
    called = f'  File "{file}", line {code.count(chr(10)) + 3}, in <module>'
    return (
        f"Traceback (most recent call last):\n{called}\n    print({finding['call']})\n"
        f"{place}, in solution\n    {finding['source']}\n{last}"
    )
