"""The quickstart of the README, run as printed on the shared graph."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rl.cli.app import app
from tests.conftest import Graph

pytestmark = pytest.mark.serve

README = Path(__file__).parents[2].joinpath("README.md").read_text()
QUICKSTART = README[README.index("## Quickstart") : README.index("## How it works")]


def asked() -> list[tuple[str, str]]:
    """Every `atlas ask …` of the quickstart, and the first line of the answer printed below it."""
    found = re.findall(r"^\$ \.venv/bin/atlas (ask .*)\n(?:```python\n)?(.*)$", QUICKSTART, re.M)
    return [(command, answer) for command, answer in found]


def test_the_quickstart_asks_three_questions() -> None:
    assert len(asked()) == 3


@pytest.mark.parametrize(("command", "answer"), asked())
def test_a_question_of_the_quickstart_gets_the_printed_answer(
    graph: Graph, command: str, answer: str
) -> None:
    done = CliRunner().invoke(app, [*shlex.split(command), "--url", graph.url])
    assert done.exit_code == 0, done.output
    assert answer in done.output


def test_the_client_of_the_quickstart_runs(
    graph: Graph, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"^```python\n(from openai .*?)^```$", QUICKSTART, re.M | re.S)
    exec(compile(code.replace("http://127.0.0.1:8000", graph.url), "README.md", "exec"), {})
    assert "36" in capsys.readouterr().out
