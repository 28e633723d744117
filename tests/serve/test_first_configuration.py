"""From a wheel in an empty folder to an answer: `atlas init`, `atlas serve`, one question.

The engine is a stub of Ollama: what answers is a sentence, and everything else is real.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from benchmarks.ports import free_port
from tests import model_servers
from tests.haproxy import own_ports
from tests.model_servers import ANSWER, stub_engine
from tests.wheel import atlas, build, environment_of, install

pytestmark = pytest.mark.serial

START_S = 900.0
END_S = 120.0


@dataclass
class Served:
    """`atlas serve` in a folder."""

    process: subprocess.Popen[bytes]
    terminal: Path
    """What it printed."""
    folder: Path
    url: str
    asked: list[str]
    """What the engine was asked."""

    def wait_until_ready(self) -> None:
        ends_s = time.monotonic() + START_S
        while "ready" not in self.terminal.read_text():
            assert self.process.poll() is None, self.terminal.read_text()
            assert time.monotonic() < ends_s, self.terminal.read_text()
            time.sleep(0.5)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    built = tmp_path_factory.mktemp("wheel")
    installed = install(build(built), built / "installed")
    folder, port = tmp_path_factory.mktemp("empty"), free_port()
    environment = environment_of(installed) | own_ports()
    terminal = built / "terminal"
    with stub_engine(model_servers.OLLAMA) as engine, terminal.open("wb") as out:
        init = atlas(installed, "init", "--yes", "--engine", engine.address)
        subprocess.run(init, cwd=folder, env=environment, check=True, stdout=out, timeout=120)
        process = subprocess.Popen(
            atlas(installed, "serve", "--port", str(port)),
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        url = f"http://127.0.0.1:{port}/v1"
        try:
            running = Served(process, terminal, folder, url, engine.asked)
            running.wait_until_ready()
            yield running
        finally:
            process.terminate()
            process.wait(END_S)


def test_a_question_is_answered_by_the_engine_that_was_found(served: Served) -> None:
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)
    completion = client.chat.completions.create(
        model="atlas", messages=[{"role": "user", "content": "Who are you?"}]
    )
    assert completion.choices[0].message.content == ANSWER
    assert completion.model_extra is not None
    assert completion.model_extra["atlas"]["pair"].startswith("llama3.2-3b@")
    assert "chat llama3.2:3b" in served.asked


def test_what_it_keeps_lies_beside_the_configuration(served: Served) -> None:
    assert sorted(path.name for path in served.folder.iterdir()) == [".atlas-serve", "atlas.yaml"]
    assert (served.folder / ".atlas-serve" / "atlas.db").is_file()


def test_the_terminal_has_only_our_own_lines(served: Served) -> None:
    text = served.terminal.read_text()
    said = text[text.index("atlas-serve") :].splitlines()
    ours = ("atlas-serve ", "no API key is asked", "ready at ", "try: ", "  ")
    assert [line for line in said if line.strip() and not line.startswith(ours)] == []
