"""Programs that try to get out of the sandbox, to break it, or to leave something behind."""

from __future__ import annotations

import ctypes
import os
import platform
import textwrap
import threading

from serve_app.tools.sandbox import policy
from serve_app.tools.sandbox.client import SandboxServer

_LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"

_PROGRAMS: dict[str, str] = {
    # Time and memory.
    "loop": "while True: pass",
    "loop ignoring signals": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """,
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "mappings": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 24))",
    "threads": """
        import threading
        while True: threading.Thread(target=threading.Event().wait).start()
        """,
    "threads without a main thread": _LIBC
    + textwrap.dedent(
        """
        import threading, time
        def work():
            for i in range(1000):
                open(str(i), 'wb').write(b'x' * (1 << 20))
            time.sleep(60)
        threading.Thread(target=work).start()
        libc.syscall(60, 0)
        """
    ),
    "recursion": "def f(): return f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()",
    "exit that never ends": "import atexit\natexit.register(lambda: [0 for _ in iter(int, 1)])",
    # Output.
    "output": "while True: print('x' * 1000)",
    "raw output": "import os\nwhile True: os.write(2, b'x' * (1 << 20))",
    "closed descriptors": "import os\nos.closerange(0, 64)\nwhile True: pass",
    "forged status": """
        import os
        for fd in range(3, 64):
            try: os.write(fd, b'confined, passed')
            except OSError: pass
        """,
    # Files.
    "many files": "import itertools\nfor i in itertools.count(): open(str(i), 'w').close()",
    "many bytes": "import itertools\nfor i in itertools.count(): open(f'{i % 99}', 'wb')"
    ".write(b'x' * (1 << 22))",
    "deep folders": "import os\nwhile True:\n  os.mkdir('d')\n  os.chdir('d')",
    "deep folders with long names": """
        import os
        for i in range(40):
            os.mkdir('d' * 250)
            os.chdir('d' * 250)
        for i in range(10**6): open(str(i), 'wb').write(b'x' * 4096)
        """,
    "folders without a mode": """
        import os, time
        for i in range(50):
            os.mkdir(f'{i}', 0)
            os.mkdir(f'w{i}', 0o300)
            os.mkdir(f'w{i}/in', 0o300)
            open(f'w{i}/in/file', 'w').close()
        os.chmod('w1', 0)
        time.sleep(60)
        """,
    "names of all kinds": """
        import os
        for name in (b'\\n', b'\\xff\\xfe', b'-rf', b' ', b'.x', b'(deleted)', '\\u202e'.encode()):
            os.mkdir(name)
            open(name + b'/' + name, 'w').close()
        """,
    "links": """
        import os
        for i, to in enumerate(('/', '/tmp', '..', '/etc/passwd', '.', 'x', '/proc/self/root')):
            os.symlink(to, f'link{i}')
        open('file', 'w').close()
        for i in range(10**6): os.link('file', f'hard{i}')
        """,
    "deleted files": """
        import os, time
        held = []
        for i in range(50):
            held.append(open('f', 'wb', buffering=0))
            os.unlink('f')
            held[-1].write(b'x' * (1 << 22))
        time.sleep(60)
        """,
    "deleted mappings": """
        import mmap, os, time
        held = []
        for i in range(50):
            f = open('f', 'w+b')
            f.write(b'x' * (1 << 22)); f.flush()
            held.append(mmap.mmap(f.fileno(), 4096))
            os.unlink('f')
            f.close()
        time.sleep(60)
        """,
    "reserved bytes": _LIBC
    + textwrap.dedent(
        """
        import time
        for i in range(50):
            fd = os.open(str(i), os.O_CREAT | os.O_RDWR)
            libc.fallocate(fd, 1, ctypes.c_long(0), ctypes.c_long(1 << 30))
        time.sleep(60)
        """
    ),
    "folders that move": """
        import os, threading
        def churn(name):
            while True:
                try:
                    os.makedirs(f'{name}/a/b/c', exist_ok=True)
                    os.rename(f'{name}/a/b', f'{name}/b')
                    os.rename(f'{name}/b', f'x{name}')
                    os.rename(f'x{name}', f'{name}/a/z')
                    os.removedirs(f'{name}/a/z/c')
                except OSError: pass
        for i in range(3): threading.Thread(target=churn, args=(str(i),)).start()
        """,
    # Processes, and ends of all kinds.
    "fork": "import os\nwhile True: os.fork()",
    "program": "import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 60 &'])",
    "signal to everyone": "import os\nos.kill(-1, 9)",
    "signal to the parent": "import os\nos.kill(os.getppid(), 9)",
    "signal without a name": "import os\nos.kill(os.getpid(), 40)",
    "killed": "import os\nos.kill(os.getpid(), 9)",
    "stopped": "import os\nos.kill(os.getpid(), 19)",
    "abort": "import os\nos.abort()",
    "null pointer": "import ctypes\nctypes.string_at(0)",
    "hard exit": "import os\nos._exit(0)",
    # Out of it.
    "files outside": """
        import os
        for path in ('/tmp/atlas-sandbox-escape', '/dev/shm/atlas-sandbox-escape', '../escape'):
            try: open(path, 'w').close()
            except OSError: pass
        """,
    "root": "import os\nos.chroot('.')\nos.chdir('/..')\nos.mkdir('escape')",
    "mount": _LIBC + "libc.unshare(0x10020000)\nlibc.mount(b't', b'.', b'tmpfs', 0, None)",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))",
}

HOSTILE: dict[str, str] = {name: textwrap.dedent(code) for name, code in _PROGRAMS.items()}
"""Source of each program by its name."""


def start_counted(server: SandboxServer) -> None:
    """Start a server where the kernel refuses it a root folder of its own: it counts files.

    Raises:
        Exception: What `start` raised.
    """
    errors: list[Exception] = []

    def start() -> None:
        # The filter is this thread's, and of the processes that it starts.
        refuse_system_calls({"x86_64": 272, "aarch64": 97}[platform.machine()])  # unshare
        try:
            server.start()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def refuse_system_calls(*numbers: int) -> None:
    """Have the kernel refuse the calling thread, and what it starts, these system calls.

    Raises:
        OSError: If the kernel does not.
    """
    program = [policy._statement(policy._LOAD, policy._NUMBER)]
    for number in numbers:
        refusal = policy._statement(policy._RETURN, policy.ERRNO | policy.EPERM)
        program += [policy._jump(policy._JUMP_EQUAL, number, 0, 1), refusal]
    program.append(policy._statement(policy._RETURN, policy.ALLOW))
    code = b"".join(program)
    buffer = ctypes.create_string_buffer(code, len(code))
    argument = policy._Program(len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (policy._PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (policy._PR_SET_SECCOMP, policy._SECCOMP_MODE_FILTER, ctypes.byref(argument), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
