"""Unit tests of code in a process that the code is not in: what passes, and no way to cheat."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.scoring import extract_code
from serve_app.tools.sandbox.client import SandboxLimits, SandboxServer
from tests.sandboxes import server_of

QUESTIONS = Path(__file__).resolve().parents[3] / "configs" / "nano" / "questions.jsonl"
LIMITS = SandboxLimits(memory_mb=1024)


@pytest.fixture(scope="module")
def server() -> Iterator[SandboxServer]:
    with server_of("counted") as server:
        yield server


def passes(server: SandboxServer, code: str, *tests: str, deadline_s: float = 20) -> bool:
    return server.passes(textwrap.dedent(code), tests, LIMITS, deadline_s)


def passes_in_one_process(code: str, *tests: str) -> bool:
    """The verdict where tests are run behind the code and then say a word that it cannot know."""
    word = secrets.token_hex(8)
    program = "\n".join([textwrap.dedent(code), *map(textwrap.dedent, tests), f"print({word!r})"])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode == 0 and done.stdout.rstrip().endswith(word)


TEST = "assert solution(2) == 4"

CHEATS = [
    pytest.param(
        """
        class Any:
            def __eq__(self, other): return True
        solution = lambda x: Any()
        """,
        TEST,
        id="equal-to-all",
    ),
    pytest.param(
        """
        class Five(int):
            def __eq__(self, other): return True
            __hash__ = int.__hash__
        solution = lambda x: Five(5)
        """,
        TEST,
        id="number-equal-to-all",
    ),
    pytest.param(
        """
        class Text(str):
            def __eq__(self, other): return True
            __hash__ = str.__hash__
        solution = lambda x: [Text('wrong')]
        """,
        "assert solution(2) == ['right']",
        id="text-equal-to-all-in-a-list",
    ),
    pytest.param(
        """
        import os, sys
        print(sys.orig_argv[-1].rsplit("'", 2)[-2], flush=True)
        os._exit(0)
        """,
        TEST,
        id="says-the-word-from-the-source",
    ),
    pytest.param(
        """
        import atexit, os, sys
        word = sys.orig_argv[-1].rsplit("'", 2)[-2]
        atexit.register(lambda: (print(word, flush=True), os._exit(0)))
        solution = lambda x: 5
        """,
        TEST,
        id="says-the-word-at-exit",
    ),
    pytest.param(
        """
        import os, sys
        def solution(x):
            constants = sys._getframe(1).f_code.co_consts
            print([c for c in constants if isinstance(c, str) and len(c) == 16][-1], flush=True)
            os._exit(0)
        """,
        TEST,
        id="reads-the-frame-of-the-test",
    ),
    pytest.param(
        """
        import sys
        def solution(x):
            sys._getframe(1).f_globals['expected'] = 5
            return 5
        """,
        "expected = 4\nassert solution(2) == expected",
        id="changes-what-is-expected",
    ),
    pytest.param(
        "import builtins\nbuiltins.abs = lambda x: 0\nsolution = lambda x: 5",
        "assert abs(solution(2) - 4) < 1e-9",
        id="replaces-a-builtin",
    ),
    pytest.param(
        "def sorted(values): return [1, 2]\nsolution = lambda x: 5",
        "assert sorted(solution(2)) == [1, 2]",
        id="defines-a-builtin",
    ),
    pytest.param(
        "import builtins\nbuiltins.all = lambda x: True\nsolution = lambda x: 5",
        "assert all(solution(n) == n * n for n in range(5))",
        id="replaces-all",
    ),
    pytest.param(
        """
        import math
        math.isclose = lambda *a, **k: True
        solution = lambda x: 5
        """,
        "import math\nassert math.isclose(solution(2), 4)",
        id="changes-a-module",
    ),
    pytest.param(
        "def solution(x): raise StopIteration",
        "for value in map(solution, [2, 3]):\n    assert value == 4",
        id="ends-the-loop",
    ),
    pytest.param(
        """
        import sys
        class Any:
            def __eq__(self, other): return True
        def solution(x):
            sys._getframe(1).f_globals['solution'] = lambda x: Any()
            return 4
        """,
        "assert solution(2) == 4\nassert solution(9) == 81",
        id="replaces-itself",
    ),
    pytest.param(
        """
        import sys
        class Loud(Exception): pass
        def solution(x):
            sys.modules['__main__'].__dict__['wrong'] = Loud
            raise Loud
        """,
        "wrong = ValueError\ntry:\n    solution(2)\nexcept wrong:\n    pass",
        id="replaces-the-error-that-is-expected",
    ),
]


@pytest.mark.parametrize(("code", "test"), CHEATS)
def test_code_cannot_pass_without_passing(server: SandboxServer, code: str, test: str) -> None:
    assert not passes(server, code, test)
    # It does pass where code and tests share a process.
    assert passes_in_one_process(code, test)


ENDS = [
    pytest.param("import os\nos._exit(0)", id="at-once"),
    pytest.param("raise SystemExit(0)", id="exit"),
    pytest.param("import os\ndef solution(x): os._exit(0)", id="in-a-call"),
    pytest.param("def solution(x): raise SystemExit(0)", id="exit-in-a-call"),
    pytest.param("import os\ndef solution(x): os.close(4); os.close(5)", id="closed-pipes"),
    pytest.param("import os\ndef solution(x): os.write(5, b'\\0\\0\\0\\2[]')", id="no-message"),
    pytest.param("import os\ndef solution(x): os.write(5, b'\\xff' * 64)", id="huge-message"),
    pytest.param(
        "import os\nfor fd in range(64):\n  try: os.write(fd, b'confined, passed')\n"
        "  except OSError: pass",
        id="forged-status",
    ),
    pytest.param(
        'import os\ndef solution(x): os.write(5, b\'\\0\\0\\0\\x0f["value",["x"]]\')',
        id="no-value",
    ),
    pytest.param("def solution(x):\n  while True: print('x' * 10000)", id="output"),
    pytest.param("def solution(x)  return x", id="syntax"),
    pytest.param("def other(x): return x", id="no-solution"),
    pytest.param("solution = 4", id="no-function"),
    pytest.param("def solution(x):\n  y = []\n  y.append(y)\n  return y", id="endless-value"),
    pytest.param("def solution(x): return object()", id="no-plain-data"),
]


@pytest.mark.parametrize("code", ENDS)
@pytest.mark.parametrize(
    "test",
    [TEST, "try:\n    solution(2)\nexcept ValueError:\n    pass\nelse:\n    raise KeyError"],
    ids=["value", "error"],
)
def test_code_that_gives_no_answer_does_not_pass(
    server: SandboxServer, code: str, test: str
) -> None:
    assert not passes(server, code, test)


def test_a_code_that_is_gone_fails_tests_that_expect_any_error(server: SandboxServer) -> None:
    test = "try:\n    solution(2)\nexcept BaseException:\n    pass"
    assert passes(server, "def solution(x): raise ValueError", test)
    assert not passes(server, "import os\ndef solution(x): os._exit(0)", test)


def test_code_sees_neither_tests_nor_expected_values(server: SandboxServer) -> None:
    # Put together in the tests, so that the code itself does not hold it.
    secret = "".join(("needle", "-", secrets.token_hex(8)))
    code = """
    import gc, linecache, os, sys

    def solution(start):
        frame, found = sys._getframe(), 0
        pool = [linecache.cache, sys.argv, sys.orig_argv, dict(os.environ), gc.get_objects()]
        while frame:
            pool += [frame.f_locals, frame.f_globals, frame.f_code]
            frame = frame.f_back
        pending, seen = [pool], {}
        while pending:
            value = pending.pop()
            if id(value) in seen: continue
            seen[id(value)] = value
            if isinstance(value, str) and start in value and value != start: found += 1
            if isinstance(value, bytes) and start.encode() in value: found += 1
            pending += gc.get_referents(value)
        return found
    """
    start = secret[:10]
    test = f"assert solution({start!r}) == 0 and {secret!r}"
    assert passes(server, code, test)
    # The same search in one process with the tests finds them.
    assert not passes_in_one_process(code, test)


WORKS = [
    ("def solution(x): return x + 1", "assert solution(1) == 2"),
    ("def solution(a, b=2, *, c=3): return (a, b, c)", "assert solution(1, c=5) == (1, 2, 5)"),
    ("def solution(x): return float('nan'), float('-inf'), 0.1", "assert solution(1)[2] == 0.1"),
    ("def solution(n): return 7 ** n", "assert solution(6000) == 7 ** 6000"),
    ("def solution(x): return -x", "assert solution(-2**70) == 2**70"),
    ("def solution(x): return 'é\\ud800' + x", "assert solution('x') == 'é\\ud800x'"),
    ("def solution(x): return x[::-1]", "assert solution(b'ab') == b'ba'"),
    ("def solution(x): return {(1, 2): {3, None}}", "assert solution(0) == {(1, 2): {None, 3}}"),
    ("def solution(x): return frozenset({1j})", "assert solution(0) == {1j}"),
    ("def solution(n): return range(n)", "assert solution(3) == range(3)"),
    ("def solution(n):\n  for i in range(n): yield i", "assert list(solution(3)) == [0, 1, 2]"),
    ("def solution(d): return d.keys()", "assert sorted(solution({'b': 1, 'a': 2})) == ['a', 'b']"),
    (
        "import collections\nsolution = collections.Counter",
        "assert solution('aab') == {'a': 2, 'b': 1}",
    ),
    ("def solution(x): x.sort()", "x = [3, 1, 2]\nassert solution(x) is None and x == [1, 2, 3]"),
    ("def solution(x): x.pop('a')", "x = {'a': 1}\nsolution(x)\nassert x == {}"),
    (
        "def solution(f, xs): return [f(x) for x in xs]",
        "assert solution(lambda x: x * 2, [1]) == [2]",
    ),
    ("def solution(n): return lambda x: x + n", "assert solution(3)(4) == 7"),
    (
        "def solution(x):\n  if x < 0: raise ValueError('negative')\n  return x",
        "try:\n    solution(-1)\nexcept ValueError as error:\n    assert str(error) == 'negative'\n"
        "else:\n    raise AssertionError",
    ),
    (
        "class Bad(KeyError): pass\ndef solution(x): raise Bad(x)",
        "try:\n    solution(-1)\nexcept LookupError:\n    pass",
    ),
    (
        "def helper(x): return 2 * x\ndef solution(x): return helper(x)",
        "assert helper(2) == solution(2)",
    ),
    ("print('loud')\ndef solution(x): print(x); return x", "assert solution(1) == 1"),
    ("x = 1", "assert True"),
    ("def solution(x): return x", "def check(f):\n    assert f(1) == 1\ncheck(solution)"),
    (
        "import threading\ndef solution(x):\n  out = []\n"
        "  t = threading.Thread(target=lambda: out.append(x)); t.start(); t.join()\n  return out",
        "assert solution(1) == [1]",
    ),
]


@pytest.mark.parametrize(("code", "test"), WORKS)
def test_right_code_passes(server: SandboxServer, code: str, test: str) -> None:
    assert passes(server, code, test)
    assert passes_in_one_process(code, test)
    assert not passes(server, code, test, "assert False")


def shipped() -> list[dict[str, Any]]:
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    return [q for q in questions if q["metric"] and "tests" in q["metric"]]


def test_right_answers_to_shipped_questions_pass_and_wrong_ones_do_not(
    server: SandboxServer,
) -> None:
    questions = shipped()[::11]
    assert len(questions) >= 15
    for question, other in zip(questions, questions[1:] + questions[:1], strict=True):
        tests = question["metric"]["tests"]
        assert passes(server, extract_code(question["gold"]), *tests), question["id"]
        assert not passes(server, extract_code(other["gold"]), *tests), question["id"]
