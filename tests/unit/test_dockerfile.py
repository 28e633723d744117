"""The image is made as every other installation: the steps of the Makefile, the files of the lock.

There is no builder here: the file is read, and not run.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app import __version__, environment
from serve_app.config import load_config

ROOT = Path(__file__).parents[2]
TARGETS = ("cpu", "gpu")
RAY_CLUSTER: dict[str, Any] = yaml.safe_load(
    (ROOT / "configs/kuberay/rayservice.yaml").read_text()
)["spec"]["rayClusterConfig"]
CONTAINERS = [
    container
    for group in (RAY_CLUSTER["headGroupSpec"], *RAY_CLUSTER["workerGroupSpecs"])
    for container in group["template"]["spec"]["containers"]
]


def stages() -> dict[str, tuple[str, list[str]]]:
    """Each stage: what it builds on, and its instructions."""
    found: dict[str, tuple[str, list[str]]] = {}
    instructions: list[str] = []
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            instructions = []
            found[match[2]] = match[1], instructions
        elif line.strip():
            instructions.append(re.sub(r"\s+", " ", line))
    return found


def steps(target: str) -> list[str]:
    """All instructions that make a target, in their order."""
    base, own = stages()[target]
    return [*(steps(base) if base in stages() else []), *own]


def variables(target: str) -> dict[str, str]:
    lines = [step.removeprefix("ENV ") for step in steps(target) if step.startswith("ENV ")]
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


def made(rule: str) -> list[str]:
    """The commands of a rule of the Makefile, with its variables filled in."""
    done = subprocess.run(
        ["make", "-Bn", "PIP=pip", rule], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout.replace("\\\n", " ").splitlines()


def installs(lines: list[str]) -> list[str]:
    """`pip install …` commands, without the places that files come from."""
    places = r" --(index-url|timeout|retries) \S+| --no-index| 2$"
    found = [m[0] for line in lines for m in re.finditer(r"pip install [^|&>]*", line)]
    return list(dict.fromkeys(re.sub(places, "", command).strip() for command in found))


def test_the_cpu_image_is_installed_as_make_setup_does_it() -> None:
    assert installs(steps("cpu")) == installs(made("setup"))


def test_the_gpu_image_is_installed_as_a_node_of_the_cluster() -> None:
    commands = yaml.safe_load((ROOT / "cluster.yaml").read_text())["setup_commands"]
    said = installs([c.replace("~/venv/bin/", "").replace('"', "") for c in commands])
    there = [command.replace("$HOME/atlas-serve/", "") for command in said]
    assert installs(steps("gpu")) == [c.replace("$HOME/atlas-serve", ".") for c in there]


@pytest.mark.parametrize("target", TARGETS)
def test_the_python_of_the_image_is_that_of_the_lock(target: str) -> None:
    base, _ = stages()["base"]
    (version,) = re.findall(r"--python-version (\S+)", (ROOT / "Makefile").read_text())
    assert base.startswith(f"python:{version}-")
    assert steps(target)


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_image_copies_is_in_the_repository_and_sent_to_the_builder(target: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    sent = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    for step in steps(target):
        if step.startswith("COPY "):
            *sources, _ = step.split()[1:]
            for source in sources:
                tracked = ["git", "ls-files", "--error-unmatch", source]
                subprocess.run(tracked, cwd=ROOT, check=True, capture_output=True)
                assert any(Path(source).match(pattern) for pattern in sent), source


@pytest.mark.parametrize("target", TARGETS)
def test_all_that_is_installed_and_served_is_copied(target: str) -> None:
    copied = {
        source
        for step in steps(target)
        if step.startswith("COPY ")
        for source in step.split()[1:-1]
    }
    assert {"pyproject.toml", "README.md", "LICENSE", "serve_app", "rl"} <= copied
    (command,) = [step for step in steps(target) if step.startswith("CMD ")]
    program = yaml.safe_load(command.removeprefix("CMD "))
    assert program[:3] == ["atlas", "serve", "--config"]
    assert program[3].split("/")[0] in copied
    assert load_config(ROOT / program[3]).models


def test_the_image_says_where_ray_finds_haproxy() -> None:
    folder = "/home/ray/atlas-serve/serve_app"
    wanted = environment.settings()
    script = Path(wanted["RAY_SERVE_HAPROXY_BINARY_PATH"])
    said = variables("gpu")
    assert said["RAY_SERVE_HAPROXY_BINARY_PATH"] == f"{folder}/{script.name}"
    package = Path(wanted["ATLAS_HAPROXY_BINARY"]).relative_to(script.parents[0].anchor)
    assert said["ATLAS_HAPROXY_BINARY"].endswith("/".join(package.parts[-3:]))
    assert "WORKDIR /home/ray/atlas-serve" in steps("gpu")


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda container: container["name"])
def test_kuberay_runs_the_gpu_image(container: dict[str, Any]) -> None:
    text = (ROOT / "configs/kuberay/rayservice.yaml").read_text()
    assert container["image"] == f"registry.example.com/atlas-serve:{__version__}"
    assert f"docker build --target gpu -t {container['image']} ." in text
    assert f"WORKDIR {container['workingDir']}" in steps("gpu")


def test_what_the_page_on_deploying_says_of_images_can_be_made() -> None:
    page = (ROOT / "docs/deploy.md").read_text()
    built = re.findall(r"docker build --target (\w+)", page)
    assert set(built) == set(TARGETS)
    assert set(TARGETS) <= set(stages())
    (run,) = re.findall(r"^\$ docker run (.*)$", page, re.MULTILINE)
    (tag,) = re.findall(r"^\$ docker build .* -t (\S+) \.$", page, re.MULTILINE)
    assert run.endswith(tag)
    # The nano pool asks for no key, so it is served on loopback alone: the host's.
    assert "--network host" in run
