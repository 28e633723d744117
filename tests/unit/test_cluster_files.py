"""The files a cluster is made from, read by what reads them there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from serve_app import environment
from serve_app.config import AtlasConfig, load_config
from serve_app.graph import BuildArgs

ROOT = Path(__file__).parents[2]
SERVE_FILES = sorted((ROOT / "configs/serve").glob("*.yaml"))


def read(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / path).read_text())
    return content


CLUSTER = read("cluster.yaml")
RAY_CLUSTER = read("configs/kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]
GROUPS = [RAY_CLUSTER["headGroupSpec"], *RAY_CLUSTER["workerGroupSpecs"]]


def deployed(schema: ServeDeploySchema) -> AtlasConfig:
    """The configuration that a Serve file deploys."""
    (application,) = schema.applications
    assert application.import_path == "serve_app:build_app"
    args = BuildArgs(**application.args)
    return load_config(ROOT / args.config)


def test_ray_s_launcher_accepts_the_cluster() -> None:
    validate_config(prepare_config(CLUSTER))


def test_the_cluster_has_room_for_every_replica() -> None:
    config = load_config(ROOT / "configs/gpu-7b.yaml")
    types = CLUSTER["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    gpus = types["gpu_worker"]["resources"]["GPU"] * types["gpu_worker"]["max_workers"]
    assert gpus >= sum(model.autoscaling.min_replicas for model in config.models)
    assert "cpu_node" in types["cpu_worker"]["resources"]


@pytest.mark.parametrize("part", ["gateway", "router", "embedder"])
def test_what_needs_no_gpu_asks_for_a_cpu_node(part: str) -> None:
    config = load_config(ROOT / "configs/gpu-7b.yaml")
    assert "cpu_node" in getattr(config, part).deployment.resources
    assert "cpu_node" in config.pool.resources
    assert "cpu_node" not in CLUSTER["available_node_types"]["gpu_worker"]["resources"]


@pytest.mark.parametrize("path", SERVE_FILES, ids=lambda path: path.name)
def test_serve_accepts_the_files_and_they_deploy_a_configuration(path: Path) -> None:
    config = deployed(ServeDeploySchema(**yaml.safe_load(path.read_text())))
    assert config.models


def test_the_ray_service_deploys_the_same_graph() -> None:
    inside = read("configs/kuberay/rayservice.yaml")["spec"]["serveConfigV2"]
    file = read("configs/serve/gpu-7b.yaml")
    assert ServeDeploySchema(**yaml.safe_load(inside)) == ServeDeploySchema(**file)


@pytest.mark.parametrize("group", GROUPS, ids=["head", "cpu", "gpu"])
def test_every_pod_has_the_variables_that_ray_reads(group: dict[str, Any]) -> None:
    (container,) = group["template"]["spec"]["containers"]
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    wanted = dict(environment.settings())
    wanted.pop("RAY_USAGE_STATS_ENABLED")
    assert given | wanted == given


def test_the_ray_service_keeps_the_head_s_state_and_puts_nothing_on_it() -> None:
    assert RAY_CLUSTER["gcsFaultToleranceOptions"]["redisAddress"]
    assert RAY_CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_variables_can_be_evaluated_by_a_shell() -> None:
    atlas = Path(sys.executable).with_name("atlas")
    script = f'eval "$({atlas} environment)" && echo $RAY_SERVE_THROUGHPUT_OPTIMIZED'
    said = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout == "1\n"
