"""The sandbox against a list of escapes, each shown to work outside it where it can."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import pytest

from serve_app.tools.sandbox.client import SandboxServer
from tests.sandboxes import KINDS, Run, runs_on, server_of

SECRET = "hunter2-of-the-host"
REPOSITORY = Path(__file__).resolve().parents[3]

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
        "descriptors-of-its-own",
        SYSCALL + "if libc.syscall(436, 100, 200, 2) == 0: print('ESCAPED')",
    ),
    escape(
        "thread-with-descriptors-of-its-own",
        SYSCALL
        + textwrap.dedent(
            """
            import os
            stack = ctypes.create_string_buffer(1 << 16)
            top = ctypes.c_void_p((ctypes.addressof(stack) + (1 << 16)) & ~15)
            shared = 0x100 | 0x800 | 0x10000  # CLONE_VM, SIGHAND and THREAD, without CLONE_FILES
            if libc.clone(libc.pause, top, shared, None) > 0: print('ESCAPED', flush=True)
            os._exit(0)
            """
        ),
    ),
    escape(
        "reserve-beyond-the-size-of-a-file",
        SYSCALL
        + textwrap.dedent(
            """
            import os
            fd = os.open(T['name'], os.O_CREAT | os.O_RDWR)
            size = ctypes.c_long(24 << 20)
            if libc.fallocate(fd, 1, ctypes.c_long(0), size) == 0: print('ESCAPED')
            """
        ),
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
    secret_file = outside / "private" / "token"
    secret_file.parent.mkdir(0o700)
    secret_file.write_text(SECRET)
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
        "secret_file": str(secret_file),
        "disk_blocks": os.statvfs("/").f_blocks,
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


LOOKS = [
    escape("size-of-a-file", "import os\nif os.stat('/etc/passwd').st_size: print('ESCAPED')"),
    escape("size-of-a-file-of-ours", "import os\nif os.stat(T['secret_file']): print('ESCAPED')"),
    escape("is-there", "import os\nif os.access(T['outside_file'], os.F_OK): print('ESCAPED')"),
    escape("where-a-link-leads", "import os\nif os.readlink('/proc/self/cwd'): print('ESCAPED')"),
    escape(
        "is-there-a-process",
        "import os\nif os.access(f\"/proc/{T['owner']}\", os.F_OK): print('ESCAPED')",
    ),
    escape(
        "size-of-the-disk",
        """
        import os
        if os.statvfs('/').f_blocks == T['disk_blocks']: print('ESCAPED')
        """,
    ),
    escape(
        "read-after-climbing-up",
        """
        import os
        for _ in range(20): os.chdir('..')
        if os.path.exists('etc/passwd'): print('ESCAPED')
        """,
    ),
]
"""What may be asked about files that cannot be opened; Landlock does not cover it."""


LISTED = [
    escape("write-file", "open(T['file'], 'a').close()\nprint('ESCAPED')"),
    escape("truncate-file", "import os\nos.truncate(T['file'], 0)\nprint('ESCAPED')"),
    escape("delete-file", "import os\nos.unlink(T['file'])\nprint('ESCAPED')"),
    escape("write-in-folder", "open(T['folder'] + '/in', 'r+').close()\nprint('ESCAPED')"),
    escape("make-file-in-folder", "open(T['folder'] + '/new', 'w').close()\nprint('ESCAPED')"),
    escape("make-folder-in-folder", "import os\nos.mkdir(T['folder'] + '/d')\nprint('ESCAPED')"),
    escape("delete-in-folder", "import os\nos.unlink(T['folder'] + '/in')\nprint('ESCAPED')"),
    escape(
        "rename-in-folder",
        "import os\nos.rename(T['folder'] + '/in', T['folder'] + '/moved')\nprint('ESCAPED')",
    ),
    escape("move-out", "import os\nos.rename(T['file'], 'moved')\nprint('ESCAPED')", control=False),
    escape(
        "write-through-hard-link",
        "import os\nos.link(T['file'], 'own')\nopen('own', 'a').close()\nprint('ESCAPED')",
        control=False,
    ),
    escape(
        "write-through-link-of-ones-own",
        """
        import os
        os.symlink(T['file'], T['name'])
        open(T['name'], 'a').close()
        print('ESCAPED')
        """,
    ),
    escape(
        "write-to-memory-of-file",
        """
        import mmap, os
        memory = mmap.mmap(os.open(T['file'], os.O_RDWR), 0)
        memory[:1] = b'X'
        print('ESCAPED')
        """,
    ),
    escape("read-beside", "if open(T['folder'] + '/../secret').read(): print('ESCAPED')"),
    escape("read-beside-by-name", "if open(T['folder'] + '-other').read(): print('ESCAPED')"),
    escape(
        "list-beside",
        "import os\nif 'secret' in os.listdir(T['folder'] + '/..'): print('ESCAPED')",
    ),
    escape("relative-link", "if open(T['folder'] + '/relative').read(): print('ESCAPED')"),
    escape("absolute-link", "if open(T['folder'] + '/absolute').read(): print('ESCAPED')"),
    escape("link-upwards", "if open(T['folder'] + '/up/secret').read(): print('ESCAPED')"),
    escape("link-to-etc", "if open(T['folder'] + '/etc/passwd').read(): print('ESCAPED')"),
    escape("link-to-proc", "open(T['folder'] + '/proc/environ').read()\nprint('ESCAPED')"),
    escape("proc", "open('/proc/self/environ').read()\nprint('ESCAPED')"),
    escape("owner", "if open(f\"/proc/{T['owner']}/environ\").read(): print('ESCAPED')"),
    escape("passwd", "if open('/etc/passwd').read(): print('ESCAPED')"),
    escape("run-file", "import os\nos.execv(T['folder'] + '/program', ['program'])", control=True),
    escape(
        "tcp",
        "import socket\nsocket.create_connection(('127.0.0.1', T['tcp']), 2)\nprint('ESCAPED')",
    ),
]
"""What does not work with a file and a folder that a run may read."""


@pytest.fixture
def listed(targets: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A file and a folder for a run to read, with secrets beside them and links to these."""
    # Where a sandbox's user, too, may go: pytest's own folders are private.
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        top.chmod(0o755)
        folder = top / "folder"
        folder.mkdir()
        for file in (top / "file", top / "secret", top / "folder-other", folder / "in"):
            file.write_text(SECRET)
        (folder / "program").write_text("#!/bin/sh\necho ESCAPED\n")
        (folder / "program").chmod(0o755)
        (folder / "relative").symlink_to("../secret")
        (folder / "absolute").symlink_to(top / "secret")
        (folder / "up").symlink_to("..")
        (folder / "etc").symlink_to("/etc")
        (folder / "proc").symlink_to("/proc/self")
        yield targets | {"folder": str(folder), "file": str(top / "file")}


SHOWN = "import sys\nT['folder'], T['file'] = sys.argv[1:]\n"
"""Where a run sees what it may read."""


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[SandboxServer]:
    """One warm server, as a tool's worker has it, with a secret in its owner's environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATLAS_TEST_SECRET", SECRET)
        with server_of(request.param) as server:
            yield server


@pytest.fixture
def run(server: SandboxServer) -> Iterator[Run]:
    with runs_on(server) as run:
        yield run


@pytest.mark.parametrize(("code", "control"), ESCAPES)
def test_escape_is_blocked(
    run: Run, server: SandboxServer, targets: dict[str, Any], code: str, control: bool
) -> None:
    result = run(f"T = {targets | {'name': 'inside'}!r}\n{code}")
    assert "ESCAPED" not in result.stdout
    assert not result.timed_out
    if control and server.private_root:
        shown_to_work_outside(code, targets)


@pytest.mark.parametrize(("code", "control"), LOOKS)
def test_what_is_outside_cannot_even_be_looked_at(
    run: Run, server: SandboxServer, targets: dict[str, Any], code: str, control: bool
) -> None:
    if not server.private_root:
        pytest.skip("without a root folder of its own, code can ask for sizes and times")
    assert "ESCAPED" not in run(f"T = {targets!r}\n{code}").stdout
    shown_to_work_outside(code, targets)


@pytest.mark.parametrize(("code", "control"), LISTED)
def test_what_a_run_may_read_opens_nothing_else(
    run: Run, server: SandboxServer, listed: dict[str, Any], code: str, control: bool
) -> None:
    readable = [listed["folder"], listed["file"]]
    begin = f"T = {listed | {'name': 'inside'}!r}\n{SHOWN}"
    result = run(f"{begin}{code}", readable=readable)
    assert "ESCAPED" not in result.stdout
    assert "Error" in result.stderr
    assert not result.timed_out
    assert Path(listed["file"]).read_text() == SECRET
    if control and server.private_root:
        shown_to_work_outside(code, listed)


def test_a_listed_file_and_folder_can_be_read(run: Run, listed: dict[str, Any]) -> None:
    code = f"T = {{}}\n{SHOWN}import os\n" + textwrap.dedent(
        """
        print(open(T['file']).read(), open(T['folder'] + '/in').read())
        print(sorted(os.listdir(T['folder']))[0], os.listdir(), open('own', 'w').write('x'))
        """
    )
    result = run(code, readable=[listed["folder"], listed["file"]])
    assert result.stdout == f"{SECRET} {SECRET}\nabsolute [] 1\n", result.stderr


def test_the_next_run_is_shown_nothing_of_it(
    run: Run, server: SandboxServer, listed: dict[str, Any]
) -> None:
    first = run("import sys\nprint(sys.argv[1])", readable=[listed["file"]])
    path = first.stdout.strip()
    code = f"import os, sys\nprint(sys.argv[1:])\nopen({path!r})"
    result = run(code)
    assert result.stdout == "[]\n"
    assert "Error" in result.stderr
    if server.private_root:
        assert "FileNotFoundError" in result.stderr
        assert run("import os\nos.path.exists('/shown/0')").stdout == "False\n"


def test_files_beside_each_other_stay_so_and_a_missing_one_is_left_out(
    run: Run, listed: dict[str, Any]
) -> None:
    readable = [f"{listed['folder']}/in", f"{listed['folder']}/gone", f"{listed['folder']}/program"]
    code = "import os, sys\n" + textwrap.dedent(
        """
        print([os.path.basename(path) for path in sys.argv[1:]])
        print(len({os.path.dirname(path) for path in sys.argv[1:]}))
        """
    )
    assert run(code, readable=readable).stdout == "['in', 'program']\n1\n"


def test_each_run_reads_the_file_that_is_there_then(run: Run, listed: dict[str, Any]) -> None:
    code = "import sys\nprint(open(sys.argv[1]).read())"
    path = Path(listed["file"])
    assert run(code, readable=[str(path)]).stdout == f"{SECRET}\n"
    path.with_name("new").write_text("new")
    path.with_name("new").rename(path)
    assert run(code, readable=[str(path)]).stdout == "new\n"


def shown_to_work_outside(code: str, targets: dict[str, Any]) -> None:
    """The same code outside the sandbox gets through: the check of it inside can fail."""
    name = f"{targets['outside']}/{time.time_ns()}"
    outside = subprocess.run(
        [sys.executable, "-c", f"T = {targets | {'name': name}!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=targets["outside"],
        env={**os.environ, "ATLAS_TEST_SECRET": SECRET},
        check=False,
    )
    assert "ESCAPED" in outside.stdout, outside.stderr


def test_no_capability_is_left(run: Run) -> None:
    code = """
    import ctypes
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capget(header, sets) == 0
    print(list(sets))
    """
    assert run(code).stdout == "[0, 0, 0, 0, 0, 0]\n"


def test_mode_of_a_foreign_file_does_not_change(run: Run, targets: dict[str, Any]) -> None:
    path = Path(targets["outside_file"])
    before = path.stat()
    result = run(f"import os\nos.chmod({str(path)!r}, 0o777)\nos.utime({str(path)!r}, (1, 1))")
    assert result.ok
    assert (path.stat().st_mode, path.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_a_run_leaves_nothing_of_itself_in_the_memory_the_next_is_forked_from(
    run: Run, server: SandboxServer
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
