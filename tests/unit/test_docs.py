"""What can be checked of the pages without a graph: links lead somewhere, commands exist with their
options, and configurations load. tests/serve/test_docs.py runs the quickstart."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from rl.cli.app import app as rl_app
from serve_app.config import load_config
from serve_app.config.patterns.check import check_pattern
from serve_app.config.patterns.files import read_pattern
from serve_app.config.tools import CustomToolConfig
from serve_app.tools.registry import build_tool

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")])
MAX_README_BYTES = 12 << 10

_FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> Iterator[str]:
    for _, found, body in _FENCE.findall(page.read_text()):
        if found == language:
            yield body


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_title(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place), target


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [
        page.name for page in PAGES if page.parent.name == "docs" if page.name not in text
    ] == []


def test_the_readme_stays_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= MAX_README_BYTES


def atlas_commands() -> list[tuple[str, str]]:
    """Every `atlas …` of a console block, and every one between single backticks."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in blocks(page, "console") for line in block.splitlines()]
        commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        commands += re.findall(r"`(atlas [^`]+)`", _FENCE.sub("", text))
        for command in commands:
            command = re.sub(r"^(\w+=\S+ )*(\.venv/bin/)?", "", command)
            if command.startswith("atlas "):
                found.append((str(page.relative_to(ROOT)), command))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), atlas_commands())
def test_every_atlas_command_of_the_pages_exists_with_its_options(page: str, command: str) -> None:
    words = shlex.split(command.replace("…", "X"), comments=True)[1:]
    here: Any = typer.main.get_command(rl_app)
    while words and hasattr(here, "commands"):
        name = words.pop(0)
        assert name in here.commands, f"{page}: there is no {name!r} in {command!r}"
        here = here.commands[name]
    options = {option for parameter in here.params for option in parameter.opts}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in options, f"{page}: {word} in {command!r}"


def yaml_blocks() -> list[tuple[str, str]]:
    return [(page.name, block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "block"), yaml_blocks())
def test_every_yaml_block_of_the_pages_is_a_configuration_or_a_pattern_that_loads(
    page: str, block: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(block)
    if block.startswith("# pattern: "):
        check_pattern(read_pattern(path), {}, load_config(str(ROOT / "configs/nano.yaml")))
        return
    assert block.startswith("# config: "), f"{page}: say what the block configures"
    assert load_config(str(path)).models
    assert yaml.safe_load(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_and_module_command_of_a_page_can_be_run(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
    for module in set(re.findall(r"python -m ([\w.]+)", page.read_text())):
        place = ROOT / module.replace(".", "/")
        is_there = place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()
        assert is_there, f"python -m {module}"


def test_the_tool_of_ones_own_in_the_pages_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for block in blocks(ROOT / "README.md", "python") if "Tool)" in block]
    (entry,) = [
        tool
        for block in blocks(ROOT / "README.md", "yaml")
        for tool in yaml.safe_load(block).get("tools", ())
    ]
    module = types.ModuleType("my_package.tools")
    exec(compile(code, "README.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.tools", module)
    tool = build_tool(CustomToolConfig.model_validate(entry))
    glad, sad = (
        float(tool.call("sentiment", {"text": text}, 1.0).text)
        for text in ("I love this!", "I hate this!")
    )
    assert sad < 0 < glad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_and_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for target in set(re.findall(r"`make (\w+)`|^\$ make (\w+)", text, re.MULTILINE)):
        name = target[0] or target[1]
        subprocess.run(["make", "-n", name], cwd=ROOT, check=True, capture_output=True)
    for name in set(re.findall(r"`((?:configs|serve_app|rl|tests)/[\w./-]+)`", text)):
        assert (ROOT / name).exists(), name


def test_every_test_that_the_security_page_names_exists() -> None:
    named = set(
        re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/security.md").read_text())
    )
    assert named
    for path, test in named:
        source = (ROOT / path).read_text()
        assert not test or f"def {test}(" in source, f"{path}::{test}"


def test_every_finding_of_the_audit_has_a_row() -> None:
    rows = re.findall(r"^\| ([F0-9, ]+) \|", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    found = {int(number) for row in rows for number in re.findall(r"F(\d+)", row)}
    assert found == set(range(1, 37))
