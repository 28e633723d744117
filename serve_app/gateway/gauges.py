"""Gauges of a gateway: where pool, policies and beliefs stand, told again every few seconds."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from serve_app.gateway.handlers import RequestRunner
from serve_app.schemas import MemberState
from serve_app.store import Store, list_policies, serving_policies
from serve_app.store.policies import trial_policies
from serve_app.telemetry import (
    POLICY_SHARE,
    POLICY_TAKEN_BACK,
    POLICY_VERSION,
    POOL_BREAKER,
    POOL_STATE,
    ROUTER_DRIFT,
    MetricSink,
)

logger = logging.getLogger(__name__)

EVERY_S = 10.0
_MODES = ("serving", "canary", "shadow")


class Gauges:
    """Sets the gauges of one gateway replica until it is closed."""

    def __init__(self, orchestrator: RequestRunner, store: Store, metrics: MetricSink) -> None:
        """Of a gateway.

        Args:
            orchestrator: Knows the pool.
            store: Knows the policies.
            metrics: Where the gauges go.
        """
        self._orchestrator = orchestrator
        self._store = store
        self._metrics = metrics
        self._models: set[str] = set()
        """Every model there has been: the gauges of one that left go to zero."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Tell from now on."""
        self._task = asyncio.get_running_loop().create_task(self._tell_forever())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def tell(self) -> None:
        """Set every gauge to what it is now."""
        self._tell_pool()
        await self._tell_policies()
        for drift in await self._orchestrator.drifts():
            self._metrics.record(ROUTER_DRIFT, drift.deviations, candidate=str(drift.pair))

    def _tell_pool(self) -> None:
        states = {m.model_id: m.state for m in self._orchestrator.pool().models}
        held_back = self._orchestrator.breakers()
        self._models |= states.keys()
        for model_id in self._models:
            for state in MemberState:
                is_there = float(states.get(model_id) is state)
                self._metrics.record(POOL_STATE, is_there, model=model_id, state=state.value)
            self._metrics.record(POOL_BREAKER, float(model_id in held_back), model=model_id)

    async def _tell_policies(self) -> None:
        policies = await serving_policies(self._store, 1) + await trial_policies(self._store)
        for mode in _MODES:
            newest = next((policy for policy in policies if policy.mode == mode), None)
            version, share = (0, 0.0) if newest is None else (newest.policy_version, newest.share)
            self._metrics.record(POLICY_VERSION, version, mode=mode)
            self._metrics.record(POLICY_SHARE, share, mode=mode)
        taken_back = [of.taken_back or 0 for of in await list_policies(self._store)]
        self._metrics.record(POLICY_TAKEN_BACK, max(taken_back, default=0))

    async def _tell_forever(self) -> None:
        while True:
            try:
                await self.tell()
            except Exception as error:  # the next time may do better
                logger.warning("gauges are not told: %s", type(error).__name__)
            await asyncio.sleep(EVERY_S)
