"""The policy network: what it may depend on, and that what RLlib trains is what serves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from torch import Tensor

from rl.ppo.env import spaces_of
from rl.ppo.episodes import Episodes
from rl.ppo.module import RoutingModule
from rl.ppo.randomise import EnvSettings
from rl.ppo.torch_policy_net import WORTH_WEIGHT, TorchPolicyNet
from serve_app.errors import SnapshotError
from serve_app.router.policy.features import DESCRIPTOR_DIM
from serve_app.router.policy.policy_net import PolicyNet
from tests.rl.replay_data import DIM, make_replay

NUM_PAIRS = 3
SIZES: dict[str, Any] = {"width": 16, "num_heads": 2, "num_layers": 2}


def trained_net(seed: int = 0, **sizes: Any) -> TorchPolicyNet:
    """A network whose logits differ, as after training."""
    torch.manual_seed(seed)
    net = TorchPolicyNet(DIM, **(sizes or SIZES))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.8 / math.sqrt(net.query.out_features) * torch.randn_like(parameter))
    return net.eval()


def observed(size: int = 40, seed: int = 1) -> dict[str, NDArray[np.float32]]:
    """States that episodes come by, some of them under way."""
    episodes = Episodes(make_replay(), size, EnvSettings(max_steps=3, seed=seed))
    episodes.reset()
    legal = episodes.legal()
    episodes.step(np.where(np.arange(size) % 2 == 0, legal.argmax(axis=1), NUM_PAIRS + 1))
    episodes.reset(np.flatnonzero(~episodes.active))
    return episodes.observe()


def tensors(observation: dict[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in observation.items()}


def scores(
    net: TorchPolicyNet, observation: dict[str, NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    with torch.inference_mode():
        logits, values = net(tensors(observation))
    return logits.numpy(), values.numpy()


def reordered(
    observation: dict[str, NDArray[np.float32]], order: list[int]
) -> dict[str, NDArray[np.float32]]:
    mask = observation["mask"]
    worth = observation["worth"]
    return observation | {
        "candidates": observation["candidates"][:, order],
        "worth": np.concatenate([worth[:, order], worth[:, NUM_PAIRS:]], axis=1),
        "mask": np.concatenate([mask[:, order], mask[:, NUM_PAIRS:]], axis=1),
    }


def test_candidates_in_another_order_get_the_same_logits_in_that_order() -> None:
    net, observation, order = trained_net(), observed(), [2, 0, 1]
    logits, values = scores(net, observation)
    moved, moved_values = scores(net, reordered(observation, order))
    np.testing.assert_allclose(moved[:, :NUM_PAIRS], logits[:, order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moved[:, NUM_PAIRS:], logits[:, NUM_PAIRS:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moved_values, values, rtol=1e-4, atol=1e-5)


def test_rows_of_padding_change_nothing() -> None:
    net, observation = trained_net(), observed()
    logits, values = scores(net, observation)
    candidates, mask = observation["candidates"], observation["mask"]
    nothing = np.zeros((len(mask), 4, candidates.shape[2]), np.float32)
    padded = observation | {"candidates": np.concatenate([candidates, nothing], axis=1)}
    for name in ("worth", "mask"):
        parts = (
            observation[name][:, :NUM_PAIRS],
            nothing[:, :, 0],
            observation[name][:, NUM_PAIRS:],
        )
        padded[name] = np.concatenate(parts, axis=1)
    wide, wide_values = scores(net, padded)
    kept = [*range(NUM_PAIRS), NUM_PAIRS + 4, NUM_PAIRS + 5]
    np.testing.assert_allclose(wide[:, kept], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(wide_values, values, rtol=1e-4, atol=1e-5)


def test_each_candidate_is_judged_beside_the_others() -> None:
    net, observation = trained_net(), observed()
    candidates = observation["candidates"].copy()
    candidates[:, 2] += 0.5
    logits, _ = scores(net, observation)
    changed, _ = scores(net, observation | {"candidates": candidates})
    legal = observation["mask"][:, 0] > 0
    assert (np.abs(changed[legal, 0] - logits[legal, 0]) > 1e-4).all()


def test_what_the_mask_forbids_has_no_probability() -> None:
    observation = observed()
    logits, _ = scores(trained_net(), observation)
    shares = torch.from_numpy(logits).softmax(dim=1).numpy()
    assert (shares[observation["mask"] == 0] == 0).all()
    assert (shares[observation["mask"] > 0] > 0).all()


def test_an_untrained_network_prefers_what_the_rule_does_and_by_as_much() -> None:
    torch.manual_seed(0)
    observation = observed()
    logits, _ = scores(TorchPolicyNet(DIM, **SIZES), observation)
    legal = observation["mask"] > 0
    expected = WORTH_WEIGHT * observation["worth"]
    np.testing.assert_allclose(logits[legal], expected[legal], atol=1e-5)


def test_a_network_from_before_there_was_a_verifier_decides_as_it_did() -> None:
    """It had fewer features, and nothing was added to its logits."""
    net, observation = trained_net(), observed()
    earlier = net.to_tensors()
    del earlier["worth_weight"]
    earlier["candidate.weight"] = earlier["candidate.weight"][:, : DESCRIPTOR_DIM + 18]
    earlier["context.weight"] = earlier["context.weight"][:, :17]
    with torch.no_grad():
        net.worth_weight.zero_()
        net.candidate.weight[:, DESCRIPTOR_DIM + 18 :] = 0
        net.context.weight[:, 17:] = 0
    now, before = (
        scores(TorchPolicyNet.from_tensors(earlier), observation),
        scores(net, observation),
    )
    for one, other in zip(now, before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_come_back_from_their_tensors() -> None:
    net, observation = trained_net(), observed()
    drawn = torch.random.get_rng_state()
    again = TorchPolicyNet.from_tensors(net.to_tensors())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    for before, after in zip(scores(net, observation), scores(again, observation), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("candidate.weight", lambda array: array * np.nan, "not finite"),
        ("candidate.weight", lambda array: array[:, 1:], "shape"),
        ("layers.1.told.bias", lambda array: None, "layers.1.told.bias"),
        ("num_heads", lambda array: None, "num_heads"),
        ("num_heads", lambda array: array + 1, "num_heads"),
        ("query.weight", lambda array: array[0], "no weights"),
        ("surprise", lambda array: np.zeros(1, np.float32), "surprise"),
    ],
)
def test_tensors_that_are_no_policy_are_refused(name: str, change: Any, reason: str) -> None:
    given = trained_net().to_tensors()
    changed = change(given.get(name))
    if changed is None:
        del given[name]
    else:
        given[name] = changed
    for read in (PolicyNet, TorchPolicyNet.from_tensors):
        with pytest.raises(SnapshotError, match=reason):
            read(given)


@pytest.mark.parametrize(
    "sizes", [SIZES, {"width": 64}, {"width": 8, "num_heads": 1, "num_layers": 3}]
)
@pytest.mark.parametrize("num_absent", [0, 2])
def test_the_network_that_serves_is_the_one_that_was_trained(
    sizes: dict[str, Any], num_absent: int
) -> None:
    net, observation = trained_net(**sizes), observed()
    observation["candidates"][::2, :num_absent] = 0
    trained, _ = scores(net, observation)
    served = PolicyNet(net.to_tensors()).logits(observation)
    learned = (trained - WORTH_WEIGHT * observation["worth"])[observation["mask"] > 0]
    assert learned.std() > 0.1
    np.testing.assert_allclose(served, trained, rtol=1e-4, atol=1e-5)


def test_the_same_weights_give_the_same_logits_in_training_and_in_serving() -> None:
    observation_space, action_space = spaces_of(DIM, NUM_PAIRS)
    module = RoutingModule(
        observation_space=observation_space,
        action_space=action_space,
        model_config={"start": TorchPolicyNet(DIM, **SIZES).to_tensors()},
    )
    module.net.load_state_dict(trained_net().state_dict())
    observation = observed()
    served = PolicyNet(module.net.to_tensors()).logits(observation)
    _, its_values = scores(module.net, observation)
    batch = {Columns.OBS: tensors(observation)}
    for forward in (module.forward_train, module.forward_exploration, module.forward_inference):
        out = forward(batch)
        logits = out[Columns.ACTION_DIST_INPUTS].detach().numpy()
        np.testing.assert_allclose(logits, served, rtol=1e-4, atol=1e-5)
    values = module.compute_values(batch).detach().numpy()
    np.testing.assert_allclose(values, its_values, rtol=1e-5, atol=1e-6)


def test_a_module_starts_with_the_weights_it_is_given_and_remembers_them() -> None:
    observation_space, action_space = spaces_of(DIM, NUM_PAIRS)
    start = trained_net(2).to_tensors()
    module = RoutingModule(
        observation_space=observation_space,
        action_space=action_space,
        model_config={"start": start},
    )
    observation = observed()
    before = module.logits_at_start(tensors(observation)).numpy()
    for name, tensor in module.net.to_tensors().items():
        np.testing.assert_array_equal(tensor, start[name])
    with torch.no_grad():
        module.net.context.weight.add_(1.0)
    np.testing.assert_array_equal(module.logits_at_start(tensors(observation)).numpy(), before)
    assert not any("start" in name for name in module.state_dict())
