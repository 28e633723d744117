"""What a toolset's outcomes depend on and cost: its members' settings and prices."""

from __future__ import annotations

from typing import Any

import pytest

from rl.profile.prices import PriceHistory
from rl.profile.run import fingerprint
from serve_app.config import AtlasConfig
from serve_app.pool.desired import members_of
from serve_app.schemas import Pair
from serve_app.store import PoolRevision, ProfileOutcome

DESK, PLAIN = Pair("m", "desk"), Pair("m", "none")


def pool(**calculator: Any) -> AtlasConfig:
    """A model with a toolset of one calculator, and without a tool."""
    model = {"type": "custom", "model_id": "m", "import_path": "a:B", "tools": ["none", "desk"]}
    desk = {"type": "toolset", "tool_id": "desk", "description": "x", "members": ["calculator"]}
    tools = [{"type": "calculator", "tool_id": "calculator"} | calculator, desk]
    return AtlasConfig.model_validate({"models": [model], "tools": tools})


def test_a_changed_member_is_another_tool_and_another_price_is_not() -> None:
    first, other, dear = pool(), pool(max_digits=50), pool(price_usd_per_call=1.0)
    assert fingerprint(first, DESK) != fingerprint(other, DESK)
    assert fingerprint(first, DESK) == fingerprint(dear, DESK)
    assert fingerprint(first, PLAIN) == fingerprint(other, PLAIN)


def test_what_a_toolset_cost_follows_the_price_of_its_member() -> None:
    cheap, dear = pool(price_usd_per_call=1.0), pool(price_usd_per_call=2.0)
    models, tools, _ = members_of(cheap)
    then = PoolRevision(1, tuple(models.values()), tuple(tools.values()), {}, "first", 0.0)
    paid = ProfileOutcome(
        "q", "m", "desk", "f", 1.0, 10, 5, 1.0, 0.1, None, 0, "yes", None, None, 1.0
    )
    (now,) = PriceHistory(dear, [then]).of_today([paid])
    assert now.cost_usd == pytest.approx(2.0)
