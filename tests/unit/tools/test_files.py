"""The files tool: what is below the root can be listed, read and searched, and nothing else."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve_app.config.tools import FilesConfig
from serve_app.errors import ToolFailed, ToolRetry
from serve_app.tools.base import ToolResult
from serve_app.tools.builtin.files import FilesTool

DEADLINE_S = 60.0
SECRET = "hunter2-outside"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a secret beside it, and links that lead to the secret."""
    root = tmp_path / "docs"
    (root / "guides" / "deep").mkdir(parents=True)
    (root / "readme.md").write_text("Tea shop\nWe sell Tea.\nOpen daily.\n")
    (root / "guides" / "brew.txt").write_text("Boil water.\nAdd TEA.\n")
    (root / "guides" / "deep" / "more.txt").write_text("no such word\n")
    (root / "guides" / "picture.png").write_bytes(b"\x89PNG\0\0tea")
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "docs-other").mkdir()
    (tmp_path / "docs-other" / "x").write_text(SECRET)
    (root / "link").symlink_to("../secret")
    (root / "absolute").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to("..")
    (root / "inside").symlink_to("guides")
    (root / "proc").symlink_to("/proc/self")
    return root


@pytest.fixture
def docs(root: Path) -> Iterator[FilesTool]:
    before = psutil.Process().num_fds()
    yield make(root)
    assert psutil.Process().num_fds() == before


def make(root: Path, **settings: Any) -> FilesTool:
    return FilesTool(FilesConfig(tool_id="docs", root=root, **settings))


def call(tool: FilesTool, name: str, **arguments: Any) -> ToolResult:
    return tool.call(f"docs__{name}", arguments, DEADLINE_S)


def refusal(tool: FilesTool, name: str, **arguments: Any) -> str:
    """Why a call is refused; the reason names no path of ours."""
    with pytest.raises(ToolRetry) as refused:
        call(tool, name, **arguments)
    assert str(tool.config.root.parent) not in str(refused.value)
    return str(refused.value)


def test_three_functions_are_named_after_the_tool(docs: FilesTool) -> None:
    names = [function.name for function in docs.functions()]
    assert names == ["docs__list", "docs__read", "docs__search"]
    with pytest.raises(ToolFailed, match="no function"):
        docs.call("docs__delete", {}, DEADLINE_S)


def test_a_folder_is_listed_folders_first(docs: FilesTool) -> None:
    assert call(docs, "list").text.splitlines() == [
        "guides/",
        "absolute  [a link: not followed]",
        "inside  [a link: not followed]",
        "link  [a link: not followed]",
        "proc  [a link: not followed]",
        "readme.md  34 bytes",
        "up  [a link: not followed]",
    ]
    for path in ("guides", "guides/", "./guides", "guides//."):
        assert call(docs, "list", path=path).data["names"] == ["deep", "brew.txt", "picture.png"]


def test_lines_of_a_file_are_read(docs: FilesTool) -> None:
    assert call(docs, "read", path="readme.md").text == "Tea shop\nWe sell Tea.\nOpen daily."
    part = call(docs, "read", path="readme.md", start_line=2, num_lines=1)
    assert part.text == "We sell Tea.\n[lines 2 to 2 of 3]"
    assert part.data == {"lines": 3, "first": 2, "last": 2}
    past = call(docs, "read", path="readme.md", start_line=9)
    assert past.text == "[no lines: the file has 3]"


def test_a_text_is_found_whatever_its_case(docs: FilesTool) -> None:
    found = call(docs, "search", text="tea")
    assert found.text.splitlines() == [
        "readme.md:1: Tea shop",
        "readme.md:2: We sell Tea.",
        "guides/brew.txt:2: Add TEA.",
    ]
    assert found.data["complete"] is True
    assert call(docs, "search", text="tea", path="guides").text == "guides/brew.txt:2: Add TEA."
    assert call(docs, "search", text="tea", path="readme.md").data["matches"][0]["line"] == 1
    assert call(docs, "search", text="hunter2").text == "[not found]"


def test_a_binary_file_is_said_to_be_one(docs: FilesTool) -> None:
    result = call(docs, "read", path="guides/picture.png")
    assert result.text == "[a binary file: not shown]"


OUTSIDE = [
    "../secret",
    "guides/../../secret",
    "..",
    "../docs-other/x",
    "/etc/passwd",
    "//etc/passwd",
    "/proc/self/environ",
    "{parent}/secret",
    "{root}/readme.md",
    "..%2fsecret",
    "%2e%2e/secret",
    "..\\secret",
    "..\u2215secret",
    "\u2025/secret",
    "~/secret",
    "file:///etc/passwd",
    "readme.md\0",
    "../secret\0.md",
    "\ud800",
    "link",
    "absolute",
    "up",
    "up/secret",
    "inside",
    "inside/brew.txt",
    "proc/environ",
    "readme.md/",
    "readme.md/x",
    "nothing",
    "a" * 300,
    "/".join("a" * 33),
]


@pytest.mark.parametrize("path", OUTSIDE, ids=ascii)
@pytest.mark.parametrize("name", ["list", "read", "search"])
def test_nothing_outside_is_reached_by_any_name(docs: FilesTool, name: str, path: str) -> None:
    path = path.format(parent=docs.config.root.parent, root=docs.config.root)
    arguments = {"text": "e"} if name == "search" else {}
    if path == "readme.md/" and name != "list":
        return  # a file's own name
    assert SECRET not in refusal(docs, name, path=path, **arguments)


def test_what_is_no_file_is_neither_opened_nor_waited_for(docs: FilesTool) -> None:
    root = docs.config.root
    os.mkfifo(root / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(root / "socket"))
    try:
        for name in ("fifo", "socket"):
            assert f"a {name}" in refusal(docs, "read", path=name).lower()
            assert name in call(docs, "list").text
        assert "a folder" in refusal(docs, "read", path="guides")
        assert call(docs, "search", text="hunter2").text == "[not found]"
    finally:
        listener.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_is_not_opened(docs: FilesTool) -> None:
    try:
        os.mknod(docs.config.root / "zero", 0o020666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("no devices can be made here")
    assert "a device" in refusal(docs, "read", path="zero")
    assert call(docs, "search", text="hunter2").text == "[not found]"


def test_another_file_system_below_the_root_is_not_shown() -> None:
    tool = make(Path("/dev"))
    if os.stat("/dev").st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("nothing is mounted below /dev here")
    assert "another file system" in refusal(tool, "list", path="shm")


def test_a_folder_swapped_for_a_link_leads_nowhere(
    docs: FilesTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two steps of a walk, somebody makes a link of the folder that is looked at."""
    root, real_open = docs.config.root, os.open

    def swapping(path: Any, *arguments: Any, **options: Any) -> int:
        descriptor = real_open(path, *arguments, **options)
        if path == "guides":
            (root / "guides").rename(root / "moved")
            (root / "guides").symlink_to("..")
        return descriptor

    (root / "guides" / "secret").write_text("ours")
    monkeypatch.setattr(os, "open", swapping)
    assert call(docs, "read", path="guides/secret").text == "ours"
    assert "link" in refusal(docs, "read", path="guides/secret")


def test_names_and_text_that_are_no_utf8_are_shown_with_marks(docs: FilesTool) -> None:
    root = os.fsencode(docs.config.root)
    Path(os.fsdecode(root + b"/a\xff\nb")).write_bytes(b"tea\xff\n")
    assert "a\\xff\\nb  5 bytes" in call(docs, "list").text
    assert "a\\xff\\nb:1: tea\ufffd" in call(docs, "search", text="tea").text


def test_everything_is_capped_and_says_so(docs: FilesTool) -> None:
    root = docs.config.root
    for number in range(30):
        (root / "guides" / f"{number:02}.txt").write_text("tea\n" * 3)
    few = make(root, max_entries=5)
    listed = call(few, "list", path="guides")
    assert listed.text.splitlines()[-1] == "[cut: 33 entries, the first 5 are shown]"
    assert len(listed.data["names"]) == 5
    found = call(few, "search", text="tea")
    assert len(found.data["matches"]) == 5
    assert found.text.splitlines()[-1] == "[not complete: the first 5 lines are shown]"
    for settings, reason in (
        ({"max_search_bytes": 50}, "too much to read"),
        ({"max_search_entries": 12}, "too many files"),
    ):
        found = call(make(root, **settings), "search", text="nowhere")
        assert found.text == f"[not complete: there is {reason}]".replace(
            "is too many", "are too many"
        )
        assert found.data["complete"] is False
    small = make(root, max_file_bytes=4)
    assert "has 34 bytes; at most 4 are read" in refusal(small, "read", path="readme.md")
    assert call(small, "search", text="sell").text == "[not found]"


def test_a_long_file_and_a_long_line_fit_the_result(docs: FilesTool) -> None:
    (docs.config.root / "long.txt").write_text("x" * 5000 + "\n" + "line\n" * 5000)
    short = make(docs.config.root, max_result_chars=2000)
    result = call(short, "read", path="long.txt", num_lines=5000)
    assert len(result.text) <= 2000
    assert result.text.splitlines()[0] == "x" * 1000
    assert result.text.splitlines()[-1] == f"[lines 1 to {result.data['last']} of 5001]"
    assert call(short, "read", path="long.txt", start_line=5001).text.startswith(
        "line\n[lines 5001"
    )


def test_a_search_returns_what_it_found_by_its_deadline(docs: FilesTool) -> None:
    found = docs.call("docs__search", {"text": "tea"}, 0.0)
    assert found.text == "[not complete: the time was not enough]"


def test_a_very_deep_folder_is_searched_so_far(docs: FilesTool) -> None:
    deep = docs.config.root.joinpath(*["d"] * 40)
    deep.mkdir(parents=True)
    (deep / "file").write_text("tea")
    found = call(docs, "search", text="tea", path="d")
    assert found.text == "[not complete: folders deeper than 32 are not searched]"


def test_a_root_that_is_not_there_is_said_without_its_path(tmp_path: Path) -> None:
    for name in ("missing", "file"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ToolFailed) as failed:
            call(make(tmp_path / name), "list")
        assert "/" not in str(failed.value)


def test_a_root_that_is_a_link_is_followed(root: Path) -> None:
    (root.parent / "current").symlink_to(root)
    assert call(make(root.parent / "current"), "read", path="guides/brew.txt").text
