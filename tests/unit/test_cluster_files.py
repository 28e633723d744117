"""The files a cluster is made from, read by what reads them there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve._private.build_app import build_app as build_by_serve
from ray.serve.schema import ServeDeploySchema

from serve_app import environment
from serve_app.config import (
    AtlasConfig,
    AutoscalingConfig,
    DeploymentConfig,
    GatewayConfig,
    LocalModelConfig,
    load_config,
)
from serve_app.graph import BuildArgs, build_app

ROOT = Path(__file__).parents[2]
NAMES = ("gpu-7b.yaml", "nano.yaml", "ollama.yaml", "remote.yaml", "small.yaml")
CONFIGS = [ROOT / "configs" / name for name in NAMES]
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
    assert gpus >= sum(
        model.bundle.get("GPU", 0) * model.autoscaling.min_replicas
        for model in config.models
        if isinstance(model, LocalModelConfig)
    )
    assert "cpu_node" in types["cpu_worker"]["resources"]


@pytest.mark.parametrize("part", ["gateway", "router", "embedder"])
def test_what_needs_no_gpu_asks_for_a_cpu_node(part: str) -> None:
    config = load_config(ROOT / "configs/gpu-7b.yaml")
    assert "cpu_node" in getattr(config, part).deployment.resources
    assert "cpu_node" in config.pool.resources
    assert "cpu_node" not in CLUSTER["available_node_types"]["gpu_worker"]["resources"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_builds_the_graph_with_autoscaling_for_all_but_the_controller(path: Path) -> None:
    config = load_config(path)
    built = build_by_serve(build_app(BuildArgs(config=str(path))), name="atlas")
    scaling = {d.name: d._deployment_config.autoscaling_config for d in built.deployments}
    assert scaling.pop("PoolController") is None
    wanted = {
        "Gateway": config.gateway.deployment,
        "Router": config.router.deployment,
        "Embedder": config.embedder.deployment,
    }
    assert set(scaling) == set(wanted)
    per_node = {d.name: d._replica_config.max_replicas_per_node for d in built.deployments}
    for name, deployment in wanted.items():
        assert per_node[name] == deployment.max_replicas_per_node
        assert scaling[name].min_replicas == deployment.autoscaling.min_replicas
        assert scaling[name].max_replicas == deployment.autoscaling.max_replicas
        assert scaling[name].target_ongoing_requests < deployment.max_ongoing_requests


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_accepts_how_every_model_scales(path: Path) -> None:
    for model in load_config(path).models:
        accepted = serve.config.AutoscalingConfig(**model.autoscaling.model_dump())
        assert accepted.target_ongoing_requests < model.max_ongoing_requests


def test_on_a_cluster_everything_may_grow_and_what_callers_need_may_lose_a_node() -> None:
    config = load_config(ROOT / "configs/gpu-7b.yaml")
    parts = (config.gateway, config.router, config.embedder)
    scaling = [part.deployment.autoscaling for part in parts]
    scaling += [model.autoscaling for model in config.models]
    assert all(s.max_replicas > s.min_replicas for s in scaling)
    assert all(part.deployment.autoscaling.min_replicas >= 2 for part in parts)
    assert all(part.deployment.max_replicas_per_node == 1 for part in parts)


def test_on_a_laptop_there_is_one_of_everything() -> None:
    config = load_config(ROOT / "configs/nano.yaml")
    parts = (config.gateway, config.router, config.embedder)
    scaling = [part.deployment.autoscaling for part in parts]
    scaling += [model.autoscaling for model in config.models]
    assert {(s.min_replicas, s.max_replicas) for s in scaling} == {(1, 1)}


def test_a_target_that_no_replica_can_exceed_is_refused() -> None:
    grows = AutoscalingConfig(max_replicas=2, target_ongoing_requests=8)
    DeploymentConfig(max_ongoing_requests=9, autoscaling=grows)
    with pytest.raises(ValueError, match="target_ongoing_requests"):
        DeploymentConfig(max_ongoing_requests=8, autoscaling=grows)


def test_a_gateway_that_could_not_refuse_is_refused() -> None:
    limits = {"max_ongoing_requests": 100}
    GatewayConfig.model_validate({"limits": limits, "deployment": {"max_ongoing_requests": 101}})
    with pytest.raises(ValueError, match=r"limits\.max_ongoing_requests"):
        GatewayConfig.model_validate({"limits": limits, "deployment": {"max_ongoing_requests": 99}})


def test_gateways_that_share_a_pool_s_settings_keep_their_own_bound() -> None:
    config = load_config(ROOT / "configs/gpu-7b.yaml").gateway
    assert config.deployment.max_ongoing_requests > config.limits.max_ongoing_requests


def test_a_graph_of_remote_models_asks_for_no_gpu() -> None:
    config = load_config(ROOT / "configs/remote.yaml")
    assert {model.type for model in config.models} == {"remote"}
    assert config.gateway.auth.mode == "required"


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
    for place in ("ATLAS_HAPROXY_BINARY", "RAY_SERVE_HAPROXY_BINARY_PATH"):  # the image's
        wanted.pop(place, None)
    assert given | wanted == given


def test_every_node_asks_for_the_token_that_the_launcher_copies_there() -> None:
    starts = CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith('eval "$(atlas environment)"; ') for command in starts)
    assert CLUSTER["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token" in CLUSTER["setup_commands"]
    assert any("RAY_AUTH_MODE=token" in command for command in CLUSTER["setup_commands"])


def test_the_launcher_s_dashboard_listens_on_loopback() -> None:
    (head,) = [c for c in CLUSTER["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1 " in head


def test_the_ray_service_asks_for_a_token() -> None:
    assert RAY_CLUSTER["authOptions"] == {"mode": "token"}


def test_the_network_policy_selects_every_pod_and_opens_ray_s_ports_to_them_alone() -> None:
    policy = read("configs/kuberay/networkpolicy.yaml")["spec"]
    labels = policy["podSelector"]["matchLabels"]
    assert all(group["template"]["metadata"]["labels"] == labels for group in GROUPS)
    assert policy["policyTypes"] == ["Ingress"]
    every_port = [rule for rule in policy["ingress"] if "ports" not in rule]
    assert every_port == [{"from": [{"podSelector": {"matchLabels": labels}}]}]
    others = [rule for rule in policy["ingress"] if "ports" in rule]
    opened = {entry["port"] for rule in others for entry in rule["ports"]}
    assert opened == {8000, 8265, 52365, 8080}
    for rule in others:
        assert all(peer.get("podSelector") or peer["namespaceSelector"] for peer in rule["from"])


def test_the_ray_service_keeps_the_head_s_state_and_puts_nothing_on_it() -> None:
    assert RAY_CLUSTER["gcsFaultToleranceOptions"]["redisAddress"]
    assert RAY_CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_variables_can_be_evaluated_by_a_shell() -> None:
    atlas = Path(sys.executable).with_name("atlas")
    shown = "echo $RAY_SERVE_THROUGHPUT_OPTIMIZED $RAY_AUTH_MODE $RAY_SERVE_HAPROXY_SOCKET_PATH"
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "RAY_AUTH_MODE" and not name.startswith("RAY_SERVE_HAPROXY_")
    }
    said = subprocess.run(
        ["sh", "-c", f'eval "$({atlas} environment)" && {shown}'],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    optimized, auth_mode, socket_path = said.stdout.split()
    assert (optimized, auth_mode) == ("1", "token")
    folder = Path(socket_path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
