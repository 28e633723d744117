"""The sandbox server: ordinary code, answers, ends of all kinds; and the Python tool on top."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from serve_app.config.tools import PythonConfig
from serve_app.errors import ToolFailed, ToolRetry, ToolTimeout
from serve_app.tools.builtin.python import PythonTool
from serve_app.tools.sandbox import process as sandbox_process
from serve_app.tools.sandbox.client import GRACE_S, SandboxResult, SandboxServer
from serve_app.tools.sandbox.files import disk_use
from tests.sandboxes import KINDS, LIMITS, Run, alive, runs_on, server_of, wait_until

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[SandboxServer]:
    with server_of(request.param) as server:
        yield server


@pytest.fixture
def run(server: SandboxServer) -> Iterator[Run]:
    with runs_on(server) as run:
        yield run


WORKS = [
    pytest.param("print(1 + 1)", "2\n", id="print"),
    pytest.param("1 + 1", "2\n", id="last-expression"),
    pytest.param("print('a')\n1 + 1", "a\n", id="last-expression-after-output"),
    pytest.param("x = 5\nNone", "", id="nothing-to-show"),
    pytest.param("import asyncio\nasync def f(): return 3\nasyncio.run(f())", "3\n", id="asyncio"),
    pytest.param(
        "import asyncio as a\nasync def f(): return await a.to_thread(lambda: 4)\na.run(f())",
        "4\n",
        id="asyncio-threads",
    ),
    pytest.param(
        "from concurrent.futures import ThreadPoolExecutor as P\nlist(P(4).map(abs, [-1, -2]))",
        "[1, 2]\n",
        id="thread-pool",
    ),
    pytest.param(
        "import threading, time\nthreading.Thread(target=lambda: print('late')).start()",
        "late\n",
        id="thread-is-waited-for",
    ),
    pytest.param(
        "import sqlite3\nsqlite3.connect('a.db').execute('select 6 * 7').fetchone()",
        "(42,)\n",
        id="sqlite",
    ),
    pytest.param(
        "import shutil, tempfile\nf = tempfile.mkdtemp()\nopen('a', 'w').write('hi')\n"
        "shutil.copy2('a', f)\nopen(f + '/a').read()",
        "'hi'\n",
        id="temporary-files",
    ),
    pytest.param("import zoneinfo\nstr(zoneinfo.ZoneInfo('UTC'))", "'UTC'\n", id="time-zones"),
    pytest.param("import xml.etree, email, ssl, hashlib, ctypes, unittest\n1", "1\n", id="imports"),
    pytest.param(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\nA(1)",
        "A(x=1)\n",
        id="dataclass",
    ),
    pytest.param(
        "import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))).__name__",
        "'A'\n",
        id="pickle-main",
    ),
    pytest.param("import sys\nprint('é\\ud800', __name__)", "é\\ud800 __main__\n", id="surrogate"),
    pytest.param("list({'b', 'a', 'c'}) == list({'b', 'a', 'c'})", "True\n", id="hashes"),
    pytest.param(
        "import os\n[os.getcwd() == os.environ['HOME'], os.listdir()]", "[True, []]\n", id="home"
    ),
    pytest.param("input()", "", id="no-input"),
]


@pytest.mark.parametrize(("code", "stdout"), WORKS)
def test_ordinary_code_works(run: Run, code: str, stdout: str) -> None:
    result = run(code)
    assert result.stdout == stdout, result.stderr
    assert result.ok or "EOFError" in result.stderr


def test_runs_do_not_see_each_other(run: Run) -> None:
    assert run("import math\nmath.pi = 3\nopen('left', 'w').write('x')").ok
    assert run("import math, os\nprint(math.pi, os.listdir())").stdout.endswith(" []\n")
    assert run("import math\nprint(math.pi)").stdout == "3.141592653589793\n"


def test_random_numbers_differ_between_runs(run: Run) -> None:
    code = "import random\nprint(random.random())"
    assert run(code).stdout != run(code).stdout


def test_exit_code_and_error_are_reported(run: Run) -> None:
    assert run("import sys\nsys.exit(3)").exit_code == 3
    assert run("import os\nos.abort()").exit_code == -signal.SIGABRT
    failed = run("def f():\n    return 1 / 0\nf()")
    assert failed.exit_code == 1
    assert 'File "<python>", line 2, in f' in failed.stderr
    assert failed.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_errors_of_libraries_show_no_foreign_path(run: Run) -> None:
    failed = run("import json\njson.loads('{')")
    assert "json.loads" in failed.stderr
    assert str(Path(os.__file__).parent) not in failed.stderr


def test_packages_can_be_added() -> None:
    with_sympy = SandboxServer(("sympy",))
    try:
        code = "import sympy\nprint(sympy.solve('x - 2'))"
        assert with_sympy.run(code, LIMITS, 20).stdout == "[2]\n"
        assert "ModuleNotFoundError" in with_sympy.run("import pydantic", LIMITS, 5).stderr
    finally:
        with_sympy.close()


def test_packages_are_not_there_unless_added(run: Run) -> None:
    for name in ("pydantic", "ray", "serve_app", "pytest"):
        assert "ModuleNotFoundError" in run(f"import {name}").stderr


def test_runs_of_two_threads_take_turns(server: SandboxServer) -> None:
    results: list[SandboxResult] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(server.run(f"{i}", LIMITS, 20)))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.stdout for result in results) == [f"{i}\n" for i in range(6)]


@pytest.mark.serial
def test_waiting_for_another_run_counts_against_the_deadline(server: SandboxServer) -> None:
    assert server.pid is not None
    process = psutil.Process(server.pid)
    busy = threading.Thread(target=lambda: server.run("while True: pass", LIMITS, 4.0))
    busy.start()
    wait_until(lambda: process.children() != [])
    with pytest.raises(ToolFailed, match="busy"):
        server.run("1", LIMITS, 0.2)
    begin = time.monotonic()
    # What is left after the wait, not the whole deadline again, is the run's.
    assert server.run("while True: pass", LIMITS, 4.5).timed_out
    assert time.monotonic() - begin < 7
    busy.join()


@pytest.fixture
def slow_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that takes long to import."""
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(3)\nVALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "slow_to_import"


@pytest.mark.serial
def test_start_counts_against_the_deadline_and_goes_on_after_it(slow_package: str) -> None:
    server = SandboxServer((slow_package,))
    begin = time.monotonic()
    with pytest.raises(ToolFailed, match="still starting"):
        server.run("1", LIMITS, 0.5)
    assert time.monotonic() - begin < 2.5
    pid = server.pid
    code = f"import {slow_package}\n{slow_package}.VALUE"
    assert server.run(code, LIMITS, 60).stdout == "7\n"
    assert server.pid == pid
    server.close()


@pytest.mark.serial
@pytest.mark.parametrize("size", [10, 1 << 20], ids=["small", "larger-than-a-pipe"])
def test_server_that_does_not_answer_is_replaced_in_time(size: int) -> None:
    server = SandboxServer()
    server.start()
    assert server.pid is not None
    base = server.base
    os.kill(server.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(ToolFailed, match="did not answer in time"):
        server.run(f"'{'x' * size}'", LIMITS, 0.2)
    assert time.monotonic() - begin < 0.2 + GRACE_S + 2
    assert server.run("1", LIMITS, 30).stdout == "1\n"
    server.close()
    wait_until(lambda: not os.path.lexists(base))


def test_failed_start_is_followed_by_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SandboxServer()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/does/not/exist")
        with pytest.raises(ToolFailed, match="cannot be started"):
            server.run("1", LIMITS, 10)
    assert server.run("1", LIMITS, 30).stdout == "1\n"
    server.close()


@pytest.mark.parametrize("kind", KINDS)
def test_server_killed_among_deep_folders_leaves_nothing(kind: str) -> None:
    deep = "import os\nfor _ in range(1200):\n  os.mkdir('d')\n  os.chdir('d')\nprint('deep')"
    with server_of(kind) as server:
        base, limits = server.base, replace(LIMITS, max_files=60_000)
        assert server.pid is not None
        process = psutil.Process(server.pid)
        errors: list[Exception] = []

        def run() -> None:
            try:
                server.run(f"{deep}\nwhile True: pass", limits, 60)
            except ToolFailed as error:
                errors.append(error)

        runner = threading.Thread(target=run)
        runner.start()
        wait_until(lambda: len(process.children(recursive=True)) == 2)
        if kind == "counted":
            wait_until(lambda: folders_are_deep(base, 1000), 60)
        process.kill()
        runner.join(timeout=30)
        assert [str(error) for error in errors] == ["the sandbox has stopped"]
        assert server.run(deep, limits, 30).stdout == "deep\n"
        wait_until(lambda: not os.path.lexists(base), 120)


def make_deep(folder: Path, levels: int) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)


def folders_are_deep(base: str, levels: int) -> bool:
    """Whether a run's folder in `base` holds this many folders, one in another."""
    return any(disk_use(entry.path, levels)[1] >= levels for entry in os.scandir(base))


def test_killed_server_takes_its_run_along_and_is_replaced() -> None:
    server = SandboxServer()
    server.start()
    assert server.pid is not None
    process = psutil.Process(server.pid)
    errors: list[Exception] = []

    def run() -> None:
        try:
            server.run("while True: pass", LIMITS, 30)
        except ToolFailed as error:
            errors.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    # The supervisor and the confined child.
    wait_until(lambda: len(process.children(recursive=True)) == 2)
    family = process.children(recursive=True)
    process.kill()
    runner.join(timeout=10)
    assert [str(error) for error in errors] == ["the sandbox has stopped"]
    wait_until(lambda: not any(alive(member) for member in family))
    assert server.run("1", LIMITS, 10).stdout == "1\n"
    server.close()


def test_owner_that_dies_takes_everything_along() -> None:
    code = textwrap.dedent(
        """
        from serve_app.tools.sandbox.client import SandboxLimits, SandboxServer
        server = SandboxServer()
        server.start()
        print(server.pid, server.base, flush=True)
        server.run("while True: pass", SandboxLimits(cpu_seconds=60), 60)
        """
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert owner.stdout is not None
    with owner.stdout:
        pid, base = owner.stdout.readline().split()
    process = psutil.Process(int(pid))
    wait_until(lambda: len(process.children(recursive=True)) == 2)
    family = [process, *process.children(recursive=True)]
    owner.kill()
    owner.wait()
    wait_until(lambda: not any(alive(member) for member in family))
    wait_until(lambda: not Path(base).exists())


def test_folders_of_killed_servers_are_swept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server, other = SandboxServer(), SandboxServer()
    server.start()
    left_over = Path(tempfile.mkdtemp(prefix=sandbox_process.BASE_PREFIX))
    make_deep(left_over, 1100)
    # Both look old; only one is in use.
    for folder in (left_over, Path(server.base)):
        os.utime(folder, (0, 0))
    other.start()
    wait_until(lambda: not left_over.exists(), 120)
    assert Path(server.base).exists()
    assert server.run("1", LIMITS, 30).stdout == "1\n"
    server.close()
    other.close()


WITHOUT = {
    "landlock": "(444,)",
    "landlock rules": "(445,)",
    "landlock for itself": "(446,)",
    "seccomp": "(157,)",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86-64's")
@pytest.mark.parametrize("missing", WITHOUT)
def test_without_confinement_nothing_is_run(missing: str, tmp_path: Path) -> None:
    # A process whose kernel refuses the calls that confine, as an older one would.
    code = textwrap.dedent(
        f"""
        import ctypes
        from serve_app.tools.sandbox import policy as p
        program = [p._statement(p._LOAD, 0)]
        for number in {WITHOUT[missing]}:
            refusal = [p._statement(p._RETURN, p.ERRNO | p.ENOSYS)]
            if number == 157:  # prctl(PR_SET_SECCOMP)
                refusal = [
                    p._statement(p._LOAD, 16), p._jump(p._JUMP_EQUAL, 22, 0, 1), *refusal,
                    p._statement(p._RETURN, p.ALLOW)]
            program += [p._jump(p._JUMP_EQUAL, number, 0, len(refusal)), *refusal]
        program = b"".join([*program, p._statement(p._RETURN, p.ALLOW)])
        buffer = ctypes.create_string_buffer(program, len(program))
        argument = p._Program(len(program) // 8, ctypes.addressof(buffer))
        libc = ctypes.CDLL(None)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, ctypes.byref(argument), 0, 0) == 0

        from serve_app.errors import ToolFailed
        from serve_app.tools.sandbox.client import SandboxLimits, run_python
        try:
            print(run_python("open({str(tmp_path / "ran")!r}, 'w')", SandboxLimits(), 60))
        except ToolFailed as error:
            print("FAILED CLOSED:", error)
        """
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        check=False,
    )
    assert "FAILED CLOSED: the sandbox is not available" in outcome.stdout, outcome.stderr
    assert not (tmp_path / "ran").exists()


def test_without_sandlock_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolFailed, match="not available"):
        SandboxServer().run("1", LIMITS, 5)


@pytest.fixture(scope="module")
def python() -> PythonTool:
    return PythonTool(PythonConfig(tool_id="python"))


def test_python_tool_returns_what_is_printed(python: PythonTool) -> None:
    result = python.run({"code": "print('a')\nprint('b')"}, 10)
    assert result.text == "a\nb"
    assert result.data["exit_code"] == 0


def test_python_tool_asks_again_with_the_error(python: PythonTool) -> None:
    with pytest.raises(ToolRetry, match=r"^NameError: name 'y' is not defined \(line 2, in f\)$"):
        python.run({"code": "def f():\n    return y\nf()"}, 10)
    with pytest.raises(ToolRetry, match="SyntaxError"):
        python.run({"code": "def f("}, 10)


def test_python_tool_names_a_signal_that_has_no_name(python: PythonTool) -> None:
    with pytest.raises(ToolRetry, match=r"the code crashed \(signal 40\)"):
        python.run({"code": "import os\nos.kill(os.getpid(), 40)"}, 10)
    with pytest.raises(ToolRetry, match=r"the code crashed \(SIGABRT\)"):
        python.run({"code": "import os\nos.abort()"}, 10)


def test_python_tool_says_when_nothing_was_printed(python: PythonTool) -> None:
    assert python.run({"code": "x = 1"}, 10).text == "[no output]"


def test_python_tool_gives_up_at_the_deadline(python: PythonTool) -> None:
    with pytest.raises(ToolTimeout, match=r"did not finish in 0\.3 s"):
        python.run({"code": "while True: pass"}, 0.3)


def test_python_tool_cuts_long_output(python: PythonTool) -> None:
    result = python.run({"code": "while True: print('x' * 50)"}, 10)
    assert result.data["truncated"]
    assert len(result.text) <= python.config.max_result_chars
