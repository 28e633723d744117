"""The sandbox against a list of escapes, each shown to work outside it where it can."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve_app.errors import ToolFailed, ToolRetry, ToolTimeout
from serve_app.tools import sandbox as sandbox_module
from serve_app.tools.config import PythonConfig
from serve_app.tools.python import PythonTool
from serve_app.tools.sandbox import SandboxLimits, SandboxResult, SandboxServer

LIMITS = SandboxLimits()
SECRET = "hunter2-of-the-host"
REPOSITORY = Path(__file__).resolve().parents[2]

SYSCALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
"""


def escape(name: str, code: str, *, control: bool = True) -> Any:
    """Code that prints ESCAPED if it gets out; `control` where any machine lets it outside."""
    return pytest.param(textwrap.dedent(code), control, id=name)


ESCAPES = [
    # Files.
    escape("read-passwd", "if open('/etc/passwd').read(): print('ESCAPED')"),
    escape("read-repository", "if open(T['repository_file']).read(): print('ESCAPED')"),
    escape("read-home", "if open(T['home_file']).read(): print('ESCAPED')"),
    escape("read-other-tmp", "if open(T['outside_file']).read(): print('ESCAPED')"),
    escape("list-root", "import os\nif os.listdir('/'): print('ESCAPED')"),
    escape("list-tmp", "import os\nif os.listdir(os.path.dirname(T['outside'])): print('ESCAPED')"),
    escape(
        "read-by-directory-descriptor",
        """
        import os
        fd = os.open(T['outside'], os.O_RDONLY)
        if os.read(os.open('secret', os.O_RDONLY, dir_fd=fd), 9): print('ESCAPED')
        """,
    ),
    escape(
        "read-after-chdir",
        "import os\nos.chdir(T['outside'])\nif open('secret').read(): print('ESCAPED')",
    ),
    escape(
        "read-through-symlink",
        """
        import os
        os.symlink(T['outside_file'], 'link')
        if open('link').read(): print('ESCAPED')
        """,
    ),
    escape(
        "read-through-symlinked-folder",
        """
        import os
        os.symlink('/', 'root')
        if open('root' + T['outside_file']).read(): print('ESCAPED')
        """,
    ),
    escape(
        "read-through-hard-link",
        """
        import os
        os.link(T['outside_file'], T['name'])
        if open(T['name']).read(): print('ESCAPED')
        """,
    ),
    escape(
        "read-by-moving-in",
        """
        import os
        os.rename(T['movable'], T['name'])
        print('ESCAPED')
        """,
    ),
    escape(
        "reopen-path-descriptor",
        """
        import os
        fd = os.open(T['outside_file'], os.O_PATH)
        if open(f'/proc/self/fd/{fd}').read(): print('ESCAPED')
        """,
    ),
    escape("write-outside", "open(T['outside'] + '/new', 'w').write('x')\nprint('ESCAPED')"),
    escape(
        "write-through-symlink",
        """
        import os
        os.symlink(T['outside'], T['name'])
        open(T['name'] + '/new2', 'w').write('x')
        print('ESCAPED')
        """,
    ),
    escape("truncate-outside", "import os\nos.truncate(T['scratch'], 0)\nprint('ESCAPED')"),
    escape("delete-outside", "import os\nos.unlink(T['deletable'])\nprint('ESCAPED')"),
    escape("make-folder-outside", "import os\nos.mkdir(T['outside'] + '/d')\nprint('ESCAPED')"),
    escape(
        "write-runtime",
        "import os\nopen(os.__file__, 'a').close()\nprint('ESCAPED')",
        control=False,
    ),
    escape(
        "make-device",
        "import os\nos.mknod('disk', 0o060600, os.makedev(8, 0))\nprint('ESCAPED')",
        control=False,
    ),
    escape(
        "change-owner", "import os\nos.chown(T['scratch'], 1, 1)\nprint('ESCAPED')", control=False
    ),
    escape(
        "extended-attribute",
        "import os\nos.setxattr(T['scratch'], 'user.a', b'1')\nprint('ESCAPED')",
        control=False,
    ),
    # Other processes.
    escape(
        "read-init-environment", "open('/proc/1/environ').read()\nprint('ESCAPED')", control=False
    ),
    escape(
        "read-owner-environment",
        "if open(f\"/proc/{T['owner']}/environ\").read(): print('ESCAPED')",
    ),
    escape("read-own-environment-file", "open('/proc/self/environ').read()\nprint('ESCAPED')"),
    escape(
        "read-parent-memory",
        "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').close()\nprint('ESCAPED')",
    ),
    escape("list-processes", "import os\nif os.listdir('/proc'): print('ESCAPED')"),
    escape(
        "read-owner-working-folder",
        "import os\nif os.readlink(f\"/proc/{T['owner']}/cwd\"): print('ESCAPED')",
    ),
    escape("inherit-secret", "import os\nif T['secret'] in str(os.environ): print('ESCAPED')"),
    escape("signal-victim", "import os\nos.kill(T['victim'], 0)\nprint('ESCAPED')"),
    escape("stop-parent", "import os\nos.kill(os.getppid(), 0)\nprint('ESCAPED')"),
    escape("signal-everyone", "import os\nos.kill(-1, 0)\nprint('ESCAPED')", control=False),
    escape("signal-group", "import os\nos.killpg(T['victim_group'], 0)\nprint('ESCAPED')"),
    escape(
        "signal-by-descriptor",
        """
        import os, signal
        signal.pidfd_send_signal(os.pidfd_open(T['victim']), 0)
        print('ESCAPED')
        """,
    ),
    escape(
        "signal-by-file-owner",
        """
        import fcntl, os
        read, write = os.pipe()
        fcntl.fcntl(read, fcntl.F_SETOWN, T['victim'])
        print('ESCAPED')
        """,
    ),
    escape(
        "ptrace-victim",
        SYSCALL + "if libc.ptrace(0x4206, T['victim'], 0, 0) == 0: print('ESCAPED')",
        control=False,
    ),
    escape(
        "read-victim-memory",
        SYSCALL
        + textwrap.dedent(
            """
            class Iovec(ctypes.Structure):
                _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]
            here = ctypes.create_string_buffer(8)
            local = Iovec(ctypes.addressof(here), 8)
            libc.process_vm_readv(T['victim'], ctypes.byref(local), 1, ctypes.byref(local), 1, 0)
            if ctypes.get_errno() != 1: print('ESCAPED')
            """
        ),
        control=False,
    ),
    escape(
        "slow-down-victim",
        "import os\nos.setpriority(os.PRIO_PROCESS, T['victim'], 19)\nprint('ESCAPED')",
    ),
    escape(
        "pin-victim",
        "import os\nos.sched_setaffinity(T['victim'], {0})\nprint('ESCAPED')",
        control=False,
    ),
    escape(
        "limit-victim",
        """
        import resource
        resource.prlimit(T['victim'], resource.RLIMIT_CORE, (0, 0))
        print('ESCAPED')
        """,
    ),
    # New processes and programs.
    escape("fork", "import os\nif os.fork() == 0: os._exit(0)\nprint('ESCAPED')"),
    escape("vfork", SYSCALL + "if libc.syscall(T['vfork']) >= 0: print('ESCAPED')", control=False),
    escape(
        "clone3",
        SYSCALL
        + "args = (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17)\n"
        + "pid = libc.syscall(435, args, 64)\n"
        + "if pid == 0: libc._exit(0)\nif pid > 0: print('ESCAPED')",
    ),
    escape("shell", "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])"),
    escape(
        "python",
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', \"print('ESCAPED')\"])",
    ),
    escape(
        "spawn", "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'exit'], {})\nprint('ESCAPED')"
    ),
    escape("subprocess", "import subprocess\nsubprocess.run(['/bin/echo', 'ESCAPED'], check=True)"),
    escape("system", "import os\nif os.system('exit 0') == 0: print('ESCAPED')"),
    escape(
        "memory-file-program",
        "import os\nfd = os.memfd_create('x')\nprint('ESCAPED')",
    ),
    escape(
        "daemon",
        """
        import os, signal
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if os.fork() == 0:
                print('ESCAPED', flush=True)
            os._exit(0)
        os.wait()
        """,
    ),
    escape("new-session", "import os\nos.setsid()\nprint('ESCAPED')", control=False),
    # Network.
    escape(
        "tcp",
        "import socket\nsocket.create_connection(('127.0.0.1', T['tcp']), 2)\nprint('ESCAPED')",
    ),
    escape(
        "tcp6", "import socket\nsocket.socket(socket.AF_INET6)\nprint('ESCAPED')", control=False
    ),
    escape("listen", "import socket\nsocket.create_server(('127.0.0.1', 0))\nprint('ESCAPED')"),
    escape(
        "udp",
        """
        import socket
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', T['udp']))
        print('ESCAPED')
        """,
    ),
    escape(
        "unix",
        "import socket\nsocket.socket(socket.AF_UNIX).connect(T['unix'])\nprint('ESCAPED')",
    ),
    escape(
        "abstract",
        "import socket\nsocket.socket(socket.AF_UNIX).connect(T['abstract'])\nprint('ESCAPED')",
    ),
    escape(
        "unix-datagram-from-pair",
        """
        import socket
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        a.sendto(b'x', T['datagram'])
        print('ESCAPED')
        """,
    ),
    escape(
        "unix-connect-pair",
        """
        import socket
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        a.connect(T['datagram'])
        print('ESCAPED')
        """,
    ),
    escape(
        "unix-message-from-pair",
        """
        import socket
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        a.sendmsg([b'x'], [], 0, T['datagram'])
        print('ESCAPED')
        """,
    ),
    escape(
        "netlink",
        "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nprint('ESCAPED')",
    ),
    escape(
        "raw",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\nprint('ESCAPED')",
        control=False,
    ),
    escape(
        "packet",
        "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nprint('ESCAPED')",
        control=False,
    ),
    escape(
        "vsock", "import socket\nsocket.socket(socket.AF_VSOCK)\nprint('ESCAPED')", control=False
    ),
    # Shared memory and the kernel's rarer doors.
    escape("read-shm-file", "if open(T['shm']).read(1): print('ESCAPED')"),
    escape("list-shm", "import os\nos.listdir('/dev/shm')\nprint('ESCAPED')"),
    escape(
        "attach-shared-memory",
        "from multiprocessing import shared_memory as s\n"
        "s.SharedMemory(T['segment'])\nprint('ESCAPED')",
        control=False,
    ),
    escape("system-v-memory", SYSCALL + "if libc.shmget(0, 4096, 0o1600) >= 0: print('ESCAPED')"),
    escape(
        "system-v-queue",
        SYSCALL + "if libc.msgget(0, 0o1600) >= 0: print('ESCAPED')",
        control=False,
    ),
    escape(
        "io-uring",
        SYSCALL + "if libc.syscall(425, 8, bytes(120)) >= 0: print('ESCAPED')",
        control=False,
    ),
    escape(
        "user-namespace",
        SYSCALL + "if libc.unshare(0x10000000) == 0: print('ESCAPED')",
        control=False,
    ),
    escape(
        "mount-namespace",
        SYSCALL + "if libc.unshare(0x20000) == 0: print('ESCAPED')",
        control=False,
    ),
    escape(
        "mount",
        SYSCALL + "if libc.mount(b't', b'.', b'tmpfs', 0, None) == 0: print('ESCAPED')",
        control=False,
    ),
    escape("chroot", "import os\nos.chroot('.')\nprint('ESCAPED')", control=False),
    escape(
        "raise-limits",
        """
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        print('ESCAPED')
        """,
    ),
    escape("survive-parent", SYSCALL + "if libc.prctl(1, 0, 0, 0, 0) == 0: print('ESCAPED')"),
    escape("become-root", "import os\nos.setuid(0)\nprint('ESCAPED')", control=False),
    escape(
        "keyring", SYSCALL + "if libc.syscall(250, 0, -3, 0) >= 0: print('ESCAPED')", control=False
    ),
    escape(
        "bpf",
        SYSCALL + "if libc.syscall(321, 0, bytes(72), 72) >= 0: print('ESCAPED')",
        control=False,
    ),
    escape(
        "perf",
        SYSCALL + "if libc.syscall(298, bytes(128), 0, -1, -1, 0) >= 0: print('ESCAPED')",
        control=False,
    ),
    escape("userfault", SYSCALL + "if libc.syscall(323, 1) >= 0: print('ESCAPED')", control=False),
    escape(
        "file-handle",
        SYSCALL + "libc.open_by_handle_at(-100, bytes(136), 0)\n"
        "if ctypes.get_errno() != 1: print('ESCAPED')",
        control=False,
    ),
    escape(
        "32-bit-numbers",
        SYSCALL + "libc.syscall(0x40000000 + 41, 2, 1, 0)\nprint('ESCAPED')",
        control=False,
    ),
    escape(
        "kernel-log", SYSCALL + "if libc.klogctl(10, None, 0) >= 0: print('ESCAPED')", control=False
    ),
    escape(
        "set-clock",
        "import time\ntime.clock_settime(0, time.time())\nprint('ESCAPED')",
        control=False,
    ),
    escape(
        "inherited-descriptors",
        """
        import os
        for fd in range(3, 256):
            try:
                os.fstat(fd)
            except OSError:
                continue
            print('ESCAPED', fd)
        """,
        control=False,
    ),
]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Real things to get at: files, listeners, a process, shared memory."""
    outside = tmp_path_factory.mktemp("outside")
    names = {name: outside / name for name in ("secret", "scratch", "deletable", "movable")}
    for path in names.values():
        path.write_text(SECRET)
    home_file = Path.home() / f".atlas-sandbox-test-{os.getpid()}"
    home_file.write_text(SECRET)
    shm = Path(f"/dev/shm/atlas-sandbox-test-{os.getpid()}")
    shm.write_text(SECRET)
    segment = shared_memory.SharedMemory(create=True, size=16)
    victim = subprocess.Popen(["sleep", "600"], start_new_session=True)
    abstract = f"\0atlas-sandbox-test-{os.getpid()}"
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    streams = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    streams[0].bind(str(outside / "stream"))
    streams[1].bind(abstract)
    datagram.bind(str(outside / "datagram"))
    for listener in streams:
        listener.listen(64)
    yield {
        "outside": str(outside),
        "outside_file": str(names["secret"]),
        "scratch": str(names["scratch"]),
        "deletable": str(names["deletable"]),
        "movable": str(names["movable"]),
        "repository_file": str(REPOSITORY / "serve_app" / "errors.py"),
        "home_file": str(home_file),
        "shm": str(shm),
        "segment": segment.name,
        "victim": victim.pid,
        "victim_group": victim.pid,
        "owner": os.getpid(),
        "secret": SECRET,
        "tcp": tcp.getsockname()[1],
        "udp": udp.getsockname()[1],
        "unix": str(outside / "stream"),
        "abstract": abstract,
        "datagram": str(outside / "datagram"),
        "vfork": 58,
    }
    for listener in (tcp, udp, datagram, *streams):
        listener.close()
    segment.close()
    segment.unlink()
    shm.unlink()
    home_file.unlink()
    victim.kill()
    victim.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[SandboxServer]:
    """One warm server, as a tool's worker has it, with a secret in its owner's environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATLAS_TEST_SECRET", SECRET)
        server = SandboxServer()
        server.start()
    yield server
    pid = server.pid
    server.close()
    assert pid is not None
    assert not psutil.pid_exists(pid)


@pytest.fixture
def run(server: SandboxServer) -> Iterator[Callable[..., SandboxResult]]:
    """Run code; afterwards nothing of it may be left."""

    def run_code(code: str, deadline_s: float = 10, **limits: int) -> SandboxResult:
        return server.run(textwrap.dedent(code), replace(LIMITS, **limits), deadline_s)

    yield run_code
    assert server.pid is not None
    wait_until(lambda: psutil.Process(server.pid).children(recursive=True) == [])
    assert os.listdir(server.base) == []


def wait_until(claim: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Give what happens in other processes a moment."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


@pytest.mark.parametrize(("code", "control"), ESCAPES)
def test_escape_is_blocked(
    run: Callable[..., SandboxResult], targets: dict[str, Any], code: str, control: bool
) -> None:
    result = run(f"T = {targets | {'name': 'inside'}!r}\n{code}")
    assert "ESCAPED" not in result.stdout
    assert not result.timed_out
    if not control:
        return
    # The same code outside the sandbox gets through: the check above can fail.
    name = f"{targets['outside']}/{time.time_ns()}"
    outside = subprocess.run(
        [sys.executable, "-c", f"T = {targets | {'name': name}!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=targets["outside"],
        env={**os.environ, "ATLAS_TEST_SECRET": SECRET},
        check=False,
    )
    assert "ESCAPED" in outside.stdout, outside.stderr


def test_mode_of_a_foreign_file_does_not_change(
    run: Callable[..., SandboxResult], targets: dict[str, Any]
) -> None:
    path = Path(targets["outside_file"])
    before = path.stat()
    result = run(f"import os\nos.chmod({str(path)!r}, 0o777)\nos.utime({str(path)!r}, (1, 1))")
    assert result.ok
    assert (path.stat().st_mode, path.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_a_run_leaves_nothing_of_itself_in_the_memory_the_next_is_forked_from(
    run: Callable[..., SandboxResult], server: SandboxServer
) -> None:
    # Put together here, so that the marker is nowhere but in the run's request and output.
    marker = "".join(("mark", "er-", str(time.time_ns())))
    assert run(f"print({marker!r}, {marker!r}.upper())").ok
    assert not memory_holds(server.pid, marker.encode())
    assert not memory_holds(server.pid, marker.upper().encode())
    # Memory that does hold it is found to hold it.
    assert memory_holds(os.getpid(), marker.encode())


def memory_holds(pid: int | None, needle: bytes) -> bool:
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, mode, *_ = line.split()
            if "rw" not in mode or "[v" in line:
                continue
            start, end = (int(edge, 16) for edge in span.split("-"))
            memory.seek(start)
            try:
                if needle in memory.read(end - start):
                    return True
            except OSError:
                continue
    return False


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


@pytest.mark.parametrize(("code", "options", "stopped_by"), BOMBS)
def test_bomb_is_stopped_in_time(
    run: Callable[..., SandboxResult], code: str, options: dict[str, Any], stopped_by: str | None
) -> None:
    begin = time.monotonic()
    result = run(code, **options)
    assert time.monotonic() - begin < options.get("deadline_s", 10) + 2
    assert not result.ok
    if stopped_by is not None:
        assert result.stopped_by == stopped_by
    assert len(result.stdout) <= LIMITS.max_output_bytes
    assert len(result.stderr) <= LIMITS.max_output_bytes


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
def test_too_much_is_refused(run: Callable[..., SandboxResult], code: str, message: str) -> None:
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


def test_cpu_limit_counts_all_threads(run: Callable[..., SandboxResult]) -> None:
    result = run("while True: pass", deadline_s=30, cpu_seconds=1)
    assert result.timed_out
    assert result.exit_code == -signal.SIGXCPU
    assert result.seconds < 25


def test_what_is_printed_before_the_end_is_kept(run: Callable[..., SandboxResult]) -> None:
    result = run("print('first', flush=True)\nwhile True: pass", deadline_s=0.5)
    assert result.timed_out
    assert result.stdout == "first\n"


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
def test_ordinary_code_works(run: Callable[..., SandboxResult], code: str, stdout: str) -> None:
    result = run(code)
    assert result.stdout == stdout, result.stderr
    assert result.ok or "EOFError" in result.stderr


def test_runs_do_not_see_each_other(run: Callable[..., SandboxResult]) -> None:
    assert run("import math\nmath.pi = 3\nopen('left', 'w').write('x')").ok
    assert run("import math, os\nprint(math.pi, os.listdir())").stdout.endswith(" []\n")
    assert run("import math\nprint(math.pi)").stdout == "3.141592653589793\n"


def test_random_numbers_differ_between_runs(run: Callable[..., SandboxResult]) -> None:
    code = "import random\nprint(random.random())"
    assert run(code).stdout != run(code).stdout


def test_exit_code_and_error_are_reported(run: Callable[..., SandboxResult]) -> None:
    assert run("import sys\nsys.exit(3)").exit_code == 3
    assert run("import os\nos.abort()").exit_code == -signal.SIGABRT
    failed = run("def f():\n    return 1 / 0\nf()")
    assert failed.exit_code == 1
    assert 'File "<python>", line 2, in f' in failed.stderr
    assert failed.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_errors_of_libraries_show_no_foreign_path(run: Callable[..., SandboxResult]) -> None:
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


def test_packages_are_not_there_unless_added(run: Callable[..., SandboxResult]) -> None:
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


def test_waiting_for_another_run_counts_against_the_deadline(server: SandboxServer) -> None:
    busy = threading.Thread(target=lambda: server.run("while True: pass", LIMITS, 1.5))
    busy.start()
    time.sleep(0.3)
    with pytest.raises(ToolFailed, match="busy"):
        server.run("1", LIMITS, 0.2)
    busy.join()


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
        from serve_app.tools.sandbox import SandboxLimits, SandboxServer
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


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_folders_of_killed_servers_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "STALE_AFTER_S", 0.0)
    server, other = SandboxServer(), SandboxServer()
    server.start()
    left_over = Path(tempfile.mkdtemp(prefix=sandbox_module.BASE_PREFIX))
    other.start()
    assert not left_over.exists()
    assert Path(server.base).exists()
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
        from serve_app.tools import sandbox_policy as p
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
        from serve_app.tools.sandbox import SandboxLimits, run_python
        try:
            print(run_python("open({str(tmp_path / "ran")!r}, 'w')", SandboxLimits(), 5))
        except ToolFailed as error:
            print("FAILED CLOSED:", error)
        """
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
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


def test_python_tool_says_when_nothing_was_printed(python: PythonTool) -> None:
    assert python.run({"code": "x = 1"}, 10).text == "[no output]"


def test_python_tool_gives_up_at_the_deadline(python: PythonTool) -> None:
    with pytest.raises(ToolTimeout, match=r"did not finish in 0\.3 s"):
        python.run({"code": "while True: pass"}, 0.3)


def test_python_tool_cuts_long_output(python: PythonTool) -> None:
    result = python.run({"code": "while True: print('x' * 50)"}, 10)
    assert result.data["truncated"]
    assert len(result.text) <= python.config.max_result_chars
