"""The system calls sandboxed code may make, as a seccomp filter: an allow-list, the rest refused.

Standard library only: the sandbox server runs this without the rest of the package. Landlock
decides which files may be opened; this filter takes away what Landlock does not cover: every
socket, new processes and programs, signals to others, file modes and owners, and rarer doors.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
ERRNO = 0x00050000
EPERM = 1
ENOSYS = 38
ENOTSUP = 95

# fmt: off
SYSCALLS: dict[str, tuple[int, int]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286),
    "pwritev2": (328, 287), "open": (2, -1), "openat": (257, 56), "openat2": (437, 437),
    "close": (3, 57), "close_range": (436, 436), "creat": (85, -1), "stat": (4, -1),
    "fstat": (5, 80), "lstat": (6, -1), "newfstatat": (262, 79), "statx": (332, 291),
    "statfs": (137, 43), "fstatfs": (138, 44), "lseek": (8, 62), "access": (21, -1),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, -1),
    "readlinkat": (267, 78), "getdents": (78, -1), "getdents64": (217, 61), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "mkdir": (83, -1), "mkdirat": (258, 34),
    "rmdir": (84, -1), "unlink": (87, -1), "unlinkat": (263, 35), "rename": (82, -1),
    "renameat": (264, 38), "renameat2": (316, 276), "link": (86, -1), "linkat": (265, 37),
    "symlink": (88, -1), "symlinkat": (266, 36), "truncate": (76, 45), "ftruncate": (77, 46),
    "fallocate": (285, 47), "fsync": (74, 82), "fdatasync": (75, 83), "flock": (73, 32),
    "umask": (95, 166), "dup": (32, 23), "dup2": (33, -1), "dup3": (292, 24), "pipe": (22, -1),
    "pipe2": (293, 59), "sendfile": (40, 71), "copy_file_range": (326, 285),
    "fadvise64": (221, 223), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226),
    "mremap": (25, 216), "brk": (12, 214), "madvise": (28, 233), "msync": (26, 227),
    "exit": (60, 93), "exit_group": (231, 94), "getpid": (39, 172), "gettid": (186, 178),
    "getppid": (110, 173), "getpgrp": (111, -1), "getpgid": (121, 155), "getsid": (124, 156),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158), "uname": (63, 160),
    "sysinfo": (99, 179), "getrusage": (98, 165), "times": (100, 153), "getrlimit": (97, 163),
    "getpriority": (140, 141), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "sched_getparam": (143, 121), "sched_getscheduler": (145, 120), "getcpu": (309, 168),
    "wait4": (61, 260), "waitid": (247, 95), "set_tid_address": (218, 96),
    "set_robust_list": (273, 99), "rseq": (334, 293), "capget": (125, 90),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "pause": (34, -1), "alarm": (37, -1), "setitimer": (38, 103),
    "getitimer": (36, 102), "restart_syscall": (219, 128), "signalfd4": (289, 74),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, -1),
    "timerfd_create": (283, 85), "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87),
    "poll": (7, -1), "ppoll": (271, 73), "select": (23, -1), "pselect6": (270, 72),
    "epoll_create": (213, -1), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, -1), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441),
    "eventfd": (284, -1), "eventfd2": (290, 19), "futex": (202, 98), "futex_waitv": (449, 449),
    "membarrier": (324, 283), "getrandom": (318, 278), "recvfrom": (45, 207),
    "shutdown": (48, 210), "getsockopt": (55, 209),
    "getsockname": (51, 204), "getpeername": (52, 205), "clone": (56, 220), "clone3": (435, 435),
    "kill": (62, 129), "tgkill": (234, 131), "prctl": (157, 167), "prlimit64": (302, 261),
    "fcntl": (72, 25), "ioctl": (16, 29), "socketpair": (53, 199), "sendto": (44, 206),
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "utime": (132, -1), "utimes": (235, -1), "utimensat": (280, 88), "futimesat": (261, -1),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "getxattr": (191, 8),
    "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12),
    "flistxattr": (196, 13),
}
# fmt: on
"""Number of each system call that the filter names: (x86_64, aarch64), -1 where there is none."""

PROGRAMS: dict[str, tuple[int, int]] = {
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, -1), "vfork": (58, -1),
    "arch_prctl": (158, -1),
}  # fmt: skip
"""What it takes to be another program, and to start more."""

PRETENDED = frozenset(
    {"chmod", "fchmod", "fchmodat", "fchmodat2", "utime", "utimes", "utimensat", "futimesat"}
)
"""Answered with success and not done: copying a file works, and no file's mode can change."""

UNSUPPORTED = frozenset(name for name in SYSCALLS if name.endswith("xattr"))
"""Answered as a file system without extended attributes does, which copying a file puts up with."""

CLONE_THREAD, CLONE_FILES = 0x00010000, 0x00000400
CLONE_NAMESPACES = 0x7E020080
"""CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""
AF_UNIX = 1
PR_SET_NAME, PR_GET_NAME = 15, 16
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030)
"""Duplicate, flags and locks; not F_SETOWN and F_SETSIG, which send signals."""
IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
_UNKNOWN_FROM = 450
_X32_FROM = 0x40000000

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2


def _statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _low(argument: int) -> int:
    """Offset of the low 32 bits of a system call's argument (little endian)."""
    return 16 + 8 * argument


def _allow_if_in(argument: int, values: tuple[int, ...]) -> list[bytes]:
    """Allow where the low half of an argument is one of the values; refuse otherwise."""
    code = [_statement(_LOAD, _low(argument))]
    for value in values:
        code += [_jump(_JUMP_EQUAL, value, 0, 1), _statement(_RETURN, ALLOW)]
    return [*code, _statement(_RETURN, ERRNO | EPERM)]


def _allow_if_null(argument: int) -> list[bytes]:
    """Allow where all 64 bits of an argument are zero; refuse otherwise."""
    return [
        _statement(_LOAD, _low(argument)),
        _jump(_JUMP_EQUAL, 0, 0, 3),
        _statement(_LOAD, _low(argument) + 4),
        _jump(_JUMP_EQUAL, 0, 0, 1),
        _statement(_RETURN, ALLOW),
        _statement(_RETURN, ERRNO | EPERM),
    ]


def _conditions(pid: int) -> dict[str, list[bytes]]:
    """What each conditional system call must look like; every list ends with a verdict."""
    return {
        # A new thread of this process that shares its descriptors; never a new process. `clone3`
        # hides its flags behind a pointer, and the C library falls back to `clone` when told it
        # does not exist.
        "clone": [
            _statement(_LOAD, _low(0)),
            _jump(_JUMP_SET, CLONE_NAMESPACES, 3, 0),
            _jump(_JUMP_SET, CLONE_THREAD, 0, 2),
            _jump(_JUMP_SET, CLONE_FILES, 0, 1),
            _statement(_RETURN, ALLOW),
            _statement(_RETURN, ERRNO | EPERM),
        ],
        "clone3": [_statement(_RETURN, ERRNO | ENOSYS)],
        # CLOSE_RANGE_UNSHARE would give a thread descriptors of its own.
        "close_range": _allow_if_in(2, (0,)),
        # Only mode 0 heeds the limit on the size of a file.
        "fallocate": _allow_if_in(1, (0,)),
        "kill": _allow_if_in(0, (pid,)),
        "tgkill": _allow_if_in(0, (pid,)),
        "prctl": _allow_if_in(0, (PR_SET_NAME, PR_GET_NAME)),
        # Limits may be read, not set.
        "prlimit64": _allow_if_null(2),
        "fcntl": _allow_if_in(1, FCNTL_COMMANDS),
        "ioctl": _allow_if_in(1, IOCTL_COMMANDS),
        # A pair connected to itself, as asyncio wants; with no address to send to, no `connect`
        # and no `sendmsg` it reaches nobody else.
        "socketpair": _allow_if_in(0, (AF_UNIX,)),
        "sendto": _allow_if_null(4),
    }


def seccomp_program(pid: int, machine: str, *, programs: bool = False) -> bytes:
    """The filter as BPF instructions.

    Args:
        pid: The process that will install it; the only one it may signal.
        machine: `x86_64` or `aarch64`.
        programs: Whether other programs and new processes may be started, under the same filter.

    Returns:
        The program: 8 bytes for each instruction.

    Raises:
        OSError: If the machine's system call numbers are not known.
    """
    if machine not in ("x86_64", "aarch64"):
        raise OSError(f"no system call table for {machine!r}")
    column = 0 if machine == "x86_64" else 1
    architecture = 0xC000003E if machine == "x86_64" else 0xC00000B7
    code = [
        _statement(_LOAD, _ARCHITECTURE),
        _jump(_JUMP_EQUAL, architecture, 1, 0),
        _statement(_RETURN, KILL_PROCESS),
        _statement(_LOAD, _NUMBER),
        _jump(_JUMP_GREATER_EQUAL, _X32_FROM, 0, 1),
        _statement(_RETURN, KILL_PROCESS),
    ]
    conditions = _conditions(pid)
    if programs:
        conditions["clone"] = [
            _statement(_LOAD, _low(0)),
            _jump(_JUMP_SET, CLONE_NAMESPACES, 0, 1),
            _statement(_RETURN, ERRNO | EPERM),
            _statement(_RETURN, ALLOW),
        ]
    for name, numbers in (SYSCALLS | (PROGRAMS if programs else {})).items():
        number = numbers[column]
        if number < 0:
            continue
        if name in PRETENDED:
            verdict = [_statement(_RETURN, ERRNO)]
        elif name in UNSUPPORTED:
            verdict = [_statement(_RETURN, ERRNO | ENOTSUP)]
        else:
            verdict = conditions.get(name, [_statement(_RETURN, ALLOW)])
        code += [_jump(_JUMP_EQUAL, number, 0, len(verdict)), *verdict]
    code += [
        _jump(_JUMP_GREATER_EQUAL, _UNKNOWN_FROM, 0, 1),
        _statement(_RETURN, ERRNO | ENOSYS),
        _statement(_RETURN, ERRNO | EPERM),
    ]
    return b"".join(code)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install_seccomp(*, programs: bool = False) -> None:
    """Filter this process's system calls from here on; there is no way back.

    Args:
        programs: As for `seccomp_program`.

    Raises:
        OSError: If the kernel refuses.
    """
    program = seccomp_program(os.getpid(), platform.machine(), programs=programs)
    buffer = ctypes.create_string_buffer(program, len(program))
    argument = _Program(len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(argument), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"seccomp: {os.strerror(code)}")
