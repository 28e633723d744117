"""A root folder of its own for sandboxed code, where the kernel lets the sandbox server mount.

The server builds it once, in a mount namespace of its own: the readable files and nothing else, on
a small tmpfs that no other process sees. Each run mounts a tmpfs there for its own
files, whose size and number of files the kernel bounds exactly, deleted and hidden ones included.
All of it is gone with the last process of the namespace, however that ends.

The server needs CAP_SYS_ADMIN, or else user namespaces; without either its runs get a counted
folder (`sandbox.files`) instead. Standard library only: the server loads this file by its path.
"""

from __future__ import annotations

import ctypes
import os

WORKDIR = "/sandbox"
"""The run's own folder, as seen in the private root."""
SHOWN = "/shown"
"""Where a run sees the files and folders that only it may read."""

_PAGE = 4096
_NEWNS, _NEWUSER = 0x20000, 0x10000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_CAP_SYS_ADMIN = 21

_libc = ctypes.CDLL(None, use_errno=True)


def _check(outcome: int, what: str) -> None:
    if outcome != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    outcome = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode(),
    )
    _check(outcome, f"mount of {kind or 'a folder'}")


def is_possible(base: str, readable: tuple[str, ...]) -> bool:
    """Whether this process may build a private root; tried in a child, so nothing changes here."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            build(base, readable)
            _mount_workdir(base, _PAGE, 1, os.geteuid())
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def build(base: str, readable: tuple[str, ...]) -> None:
    """Enter a mount namespace of its own and make `base`, seen from inside them, a private root.

    Args:
        base: An empty folder.
        readable: Absolute paths of the files and folders that it shows.

    Raises:
        OSError: If the kernel refuses.
    """
    _enter_namespace()
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    shown: set[str] = set()
    made: set[str] = set()
    for path in sorted(readable):
        if any(parent in shown for parent in _parents(path)):
            continue
        shown.add(path)
        made |= set(_parents(path))
        target = base + path
        if os.path.isdir(path):
            os.makedirs(target)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        _mount(path, target, None, _MS_BIND | _MS_REC)
    os.mkdir(base + WORKDIR)
    os.mkdir(base + SHOWN)
    # An import system that cached a folder's listing takes it for changed when its time has.
    for folder in made:
        info = os.stat(folder)
        os.utime(base + folder, ns=(info.st_atime_ns, info.st_mtime_ns))


def _parents(path: str) -> list[str]:
    found = []
    while len(path := os.path.dirname(path)) > 1:
        found.append(path)
    return found


def _enter_namespace() -> None:
    if _may_mount():
        _check(_libc.unshare(_NEWNS), "unshare")
        return
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(_NEWNS | _NEWUSER), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _may_mount() -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        effective = next(line for line in status if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) & (1 << _CAP_SYS_ADMIN))


def enter(base: str, limits: dict[str, int], uid: int, shown: list[str]) -> list[str]:
    """Make the private root this process's root, and an empty folder in it the current one.

    Args:
        base: Where `build` made it.
        limits: `max_disk_bytes` and `max_files` of the folder.
        uid: The folder's owner.
        shown: Files and folders that the root shows besides, read-only.

    Returns:
        Where it shows them: under their own names, those of one folder together.

    Raises:
        OSError: If the kernel refuses.
    """
    _check(_libc.unshare(_NEWNS), "unshare")
    _mount_workdir(base, limits["max_disk_bytes"], limits["max_files"], uid)
    seen = _mount_shown(base, shown) if shown else []
    os.chroot(base)
    os.chdir(WORKDIR)
    return seen


def _mount_shown(base: str, shown: list[str]) -> list[str]:
    # On a tmpfs of the run's own: no other run finds out what this one was shown.
    _mount("tmpfs", base + SHOWN, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={_PAGE},mode=755")
    folders = [os.path.dirname(path) for path in shown]
    for number in {folders.index(folder) for folder in folders}:
        os.mkdir(f"{base}{SHOWN}/{number}")
        os.chmod(f"{base}{SHOWN}/{number}", 0o755)
    seen = []
    for path, folder in zip(shown, folders, strict=True):
        target = f"{SHOWN}/{folders.index(folder)}/{os.path.basename(path)}"
        if os.path.isdir(path):
            os.mkdir(base + target)
        else:
            os.close(os.open(base + target, os.O_CREAT | os.O_WRONLY))
        _mount(path, base + target, None, _MS_BIND)
        # A bind mount takes its flags only when it is mounted again.
        flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        _mount("none", base + target, None, _MS_REMOUNT | _MS_BIND | flags)
        seen.append(target)
    return seen


def _mount_workdir(base: str, max_bytes: int, max_files: int, uid: int) -> None:
    # A size of 0 would mean no limit. The folder itself is one of the inodes.
    writable = 0 if max_bytes >= _PAGE else _MS_RDONLY
    size = max(max_bytes // _PAGE, 1) * _PAGE
    options = f"size={size},nr_inodes={max_files + 1},mode=700,uid={uid}"
    _mount("tmpfs", base + WORKDIR, "tmpfs", _MS_NOSUID | _MS_NODEV | writable, options)


def leave(base: str) -> None:
    """Uncover the folder that `build` was given, so that it can be deleted."""
    _libc.umount2(os.fsencode(base), _MNT_DETACH)
