"""What one sandboxed run may use, in a root folder of its own and counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app.tools.sandbox.client import SandboxServer
from tests.sandboxes import KINDS, LIMITS, Run, runs_on, server_of


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[SandboxServer]:
    with server_of(request.param) as server:
        yield server


@pytest.fixture
def run(server: SandboxServer) -> Iterator[Run]:
    with runs_on(server) as run:
        yield run


BOMBS = [
    pytest.param("while True: pass", {"deadline_s": 0.4}, "deadline", id="loop"),
    pytest.param("import time\ntime.sleep(60)", {"deadline_s": 0.4}, "deadline", id="sleep"),
    pytest.param(
        """
        import signal
        for number in range(1, 64):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """,
        {"deadline_s": 0.4},
        "deadline",
        id="loop-ignoring-signals",
    ),
    pytest.param(
        "import os\nos.close(1)\nos.close(2)\nwhile True: pass",
        {"deadline_s": 0.4},
        "deadline",
        id="loop-with-output-closed",
    ),
    pytest.param(
        "'a' * 10**6\n(lambda: [x for x in iter(int, 1)])()", {"deadline_s": 0.4}, None, id="growth"
    ),
    pytest.param("while True: print('x' * 100)", {}, "output", id="output"),
    pytest.param(
        "import sys\nwhile True: sys.stderr.write('x' * 100)", {}, "output", id="error-output"
    ),
    pytest.param(
        "import os\nwhile True: os.write(1, b'x' * (1 << 20))", {}, "output", id="raw-output"
    ),
    pytest.param(
        "import itertools\nfor i in itertools.count(): open(str(i), 'w').close()",
        {},
        "files",
        id="many-files",
    ),
    pytest.param(
        """
        import os
        while True:
            os.mkdir('d')
            os.chdir('d')
        """,
        {},
        "files",
        id="deep-folders",
    ),
    pytest.param(
        """
        for i in range(10**6):
            open(str(i % 200), 'wb').write(b'x' * (1 << 18))
        """,
        {"max_disk_bytes": 4 << 20},
        "disk",
        id="disk",
    ),
    pytest.param(
        """
        import os, time
        held = []
        for i in range(40):
            held.append(open(str(i), 'wb', buffering=0))
            os.unlink(str(i))
            held[-1].write(b'x' * (1 << 19))
        time.sleep(60)
        """,
        {"max_disk_bytes": 4 << 20},
        "disk",
        id="deleted-files",
    ),
]


@pytest.mark.serial
@pytest.mark.parametrize(("code", "options", "stopped_by"), BOMBS)
def test_bomb_is_stopped_in_time(
    run: Run, server: SandboxServer, code: str, options: dict[str, Any], stopped_by: str | None
) -> None:
    begin = time.monotonic()
    result = run(code, **options)
    assert time.monotonic() - begin < options.get("deadline_s", 10) + 2
    assert not result.ok
    if server.private_root and stopped_by in ("files", "disk"):
        assert "No space left on device" in result.stderr
    elif stopped_by is not None:
        assert result.stopped_by == stopped_by
    assert len(result.stdout) <= LIMITS.max_output_bytes
    assert len(result.stderr) <= LIMITS.max_output_bytes


def hidden(name: str, code: str, **limits: int) -> Any:
    """Code that prints ESCAPED once it has, and goes on to have, more than the limits allow."""
    return pytest.param(textwrap.dedent(code), limits, id=name)


HIDDEN = [
    hidden(
        "files-below-the-longest-path",
        """
        for _ in range(18):
            os.mkdir('d' * 250)
            os.chdir('d' * 250)
        for i in range(300): open(str(i), 'w').close()
        """,
    ),
    hidden(
        "bytes-below-the-longest-path",
        """
        for _ in range(18):
            os.mkdir('d' * 250)
            os.chdir('d' * 250)
        open('file', 'wb').write(b'x' * (4 << 20))
        """,
        max_disk_bytes=2 << 20,
    ),
    hidden(
        "files-in-a-folder-that-cannot-be-read",
        """
        os.mkdir('d', 0o300)
        for i in range(300): open(f'd/{i}', 'w').close()
        """,
    ),
    hidden(
        "deleted-files-of-a-thread",
        """
        import threading
        held = []
        def hold():
            for i in range(4):
                held.append(open(str(i), 'wb', buffering=0))
                os.unlink(str(i))
                held[-1].write(b'x' * (1 << 20))
        thread = threading.Thread(target=hold)
        thread.start()
        thread.join()
        assert len(held) == 4 and os.fstat(held[-1].fileno()).st_size, 'it ended early'
        """,
        max_disk_bytes=2 << 20,
    ),
    hidden(
        "deleted-files-that-are-mapped-and-closed",
        """
        import mmap
        held = []
        for i in range(4):
            with open('file', 'w+b') as file:
                file.write(b'x' * (1 << 20))
                file.flush()
                held.append(mmap.mmap(file.fileno(), 4096))
            os.unlink('file')
        """,
        max_disk_bytes=2 << 20,
        max_file_bytes=1 << 20,
    ),
    hidden(
        "deleted-files-without-a-main-thread",
        """
        import ctypes, threading
        held = []
        main = threading.main_thread().native_id
        def hold():
            while not open_again: time.sleep(0.01)
            for i in range(4):
                held.append(open(str(i), 'wb', buffering=0))
                os.unlink(str(i))
                held[-1].write(b'x' * (1 << 20))
            keep()
            os._exit(0)
        open_again = []
        threading.Thread(target=hold).start()
        open_again.append(1)
        ctypes.CDLL(None).syscall(60 if os.uname().machine == 'x86_64' else 93, 0)
        """,
        max_disk_bytes=2 << 20,
    ),
]


@pytest.mark.parametrize(("code", "limits"), HIDDEN)
def test_nothing_hides_from_the_count(
    run: Run, server: SandboxServer, tmp_path: Path, code: str, limits: dict[str, int]
) -> None:
    begin = "import os, time\ndef keep():\n    time.sleep({})\n    print('ESCAPED', flush=True)\n"
    result = run(f"{begin.format(20)}{code}\nkeep()", deadline_s=15, **limits)
    assert "ESCAPED" not in result.stdout
    if server.private_root:
        assert "No space left on device" in result.stderr
    else:
        assert result.stopped_by in ("files", "disk")
    # Without limits, the same code gets all that it wants.
    outside = subprocess.run(
        [sys.executable, "-c", f"{begin.format(0)}{code}\nkeep()"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert "ESCAPED" in outside.stdout, outside.stderr


REFUSALS = [
    pytest.param("while True: __import__('os').fork()", "PermissionError", id="fork-bomb"),
    pytest.param("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError", id="memory"),
    pytest.param("x = bytearray(1 << 40)", "MemoryError", id="memory-at-once"),
    pytest.param(
        "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24))", "memory", id="mappings"
    ),
    pytest.param("open('big', 'wb').write(b'x' * (9 << 20))", "File too large", id="big-file"),
    pytest.param("open('big', 'wb').truncate(1 << 30)", "File too large", id="sparse-file"),
    pytest.param(
        "x = [open('a', 'w') for _ in range(100)]", "Too many open files", id="open-files"
    ),
    pytest.param(
        """
        import threading
        for _ in range(1000):
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        """,
        "can't start new thread",
        id="threads",
        marks=pytest.mark.skipif(os.geteuid() != 0, reason="counted from outside for other users"),
    ),
    pytest.param("def f(): f()\nf()", "RecursionError", id="recursion"),
    pytest.param("eval('(' * 1000 + ')' * 1000)", "SyntaxError", id="nesting"),
    pytest.param("9 ** 9 ** 9 ** 9", "", id="huge-number"),
]


@pytest.mark.parametrize(("code", "message"), REFUSALS)
def test_too_much_is_refused(run: Run, code: str, message: str) -> None:
    result = run(code, deadline_s=5, cpu_seconds=1)
    assert not result.ok
    assert message in result.stderr


def test_many_threads_of_an_ordinary_user_are_stopped(server: SandboxServer) -> None:
    code = """
import threading, time
for _ in range(12):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
time.sleep(5)
"""
    # Root's runs have a user id of their own, and the kernel counts; others are counted by polling.
    result = server.run(code, replace(LIMITS, max_threads=4), 5)
    assert not result.ok
    assert result.stopped_by == "threads" or "can't start new thread" in result.stderr


@pytest.mark.serial
def test_cpu_limit_counts_all_threads(run: Run) -> None:
    result = run("while True: pass", deadline_s=30, cpu_seconds=1)
    assert result.timed_out
    assert result.exit_code == -signal.SIGXCPU
    assert result.seconds < 25


def test_what_is_printed_before_the_end_is_kept(run: Run) -> None:
    result = run("print('first', flush=True)\nwhile True: pass", deadline_s=0.5)
    assert result.timed_out
    assert result.stdout == "first\n"
