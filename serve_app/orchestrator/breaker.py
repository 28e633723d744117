"""A breaker for each model: who fails for everybody is left alone, and asked again now and then.

A breaker opens when so many calls in a row failed by the model's own fault. While it is open no
decision and no fallback names the model, and no call is made again; a request whose caller named
the model goes to it all the same. When its time is over, the next decision has one small request
sent (the breaker is half-open): an answer closes the breaker, a failure opens it for twice as long.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from enum import StrEnum

from serve_app.budget import Deadline
from serve_app.errors import AtlasError, EngineBusy, EngineError, InvalidRequest
from serve_app.models.clients import ModelClients
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.recovery import Fault, fault_of

logger = logging.getLogger(__name__)

_OPEN_S = 5.0
"""For how long it opens first, give or take a quarter, so that gateways do not probe in step."""
_LONGEST_S = 60.0
"""Longest time that it is open at once, unless the model asks for a longer pause."""
_PROBE_S = 10.0
"""How long a probe may take."""
_PROBE: ChatBody = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1}

_COUNTS = frozenset({Fault.PASSING, Fault.BUSY, Fault.ENGINE})
"""Faults that are the model's own. A death is not: the replica is replaced, and the controller
watches. A request that ran out of time is not either: its caller chose the time."""


class BreakerState(StrEnum):
    """Where a breaker stands."""

    CLOSED = "closed"
    """Calls go through."""
    OPEN = "open"
    """The model is left alone."""
    HALF_OPEN = "half_open"
    """A probe is under way."""


@dataclass
class _Breaker:
    failures: int = 0
    """In a row."""
    times: int = 0
    """It has opened since the last answer."""
    until_s: float = 0.0
    """Until when it is open; monotonic clock."""
    probe: asyncio.Task[None] | None = None


class Breakers:
    """The breakers of one gateway replica's models.

    Invariants:
        - A model without failures has none, and costs nothing.
        - At most one probe of a model is under way, and it ends by `_PROBE_S`.
    """

    def __init__(self, clients: ModelClients, failures: int) -> None:
        """Begin with all closed.

        Args:
            clients: Handles to the models.
            failures: Calls in a row that fail before a breaker opens.
        """
        self._failures = failures
        self._clients = clients
        self._breakers: dict[str, _Breaker] = {}

    def answered(self, model_id: str) -> None:
        """Count a call that the model answered; its refusal of a request is an answer."""
        if self._breakers.pop(model_id, None) is not None:
            logger.info("model %s answers; its breaker is closed", model_id)

    def failed(self, model_id: str, failure: AtlasError) -> None:
        """Count a call that failed, if by the model's own fault."""
        if fault_of(failure) not in _COUNTS:
            return
        breaker = self._breakers.setdefault(model_id, _Breaker())
        breaker.failures += 1
        if breaker.failures >= self._failures and not self.is_open(model_id):
            self._open(model_id, breaker, failure)

    def is_open(self, model_id: str) -> bool:
        """Whether a model is to be left alone; also while a probe is under way or due."""
        return model_id in self._breakers and self._breakers[model_id].times > 0

    def open_models(self) -> frozenset[str]:
        """Models that are to be left alone; has those probed whose time is over."""
        if not self._breakers:
            return frozenset()
        for model_id, breaker in self._breakers.items():
            is_due = breaker.times > 0 and time.monotonic() >= breaker.until_s
            if is_due and breaker.probe is None:
                task = asyncio.get_running_loop().create_task(self._probe(model_id))
                breaker.probe = task
        return frozenset(model_id for model_id in self._breakers if self.is_open(model_id))

    def states(self) -> dict[str, BreakerState]:
        """Of the models whose breaker is not closed."""
        return {
            model_id: BreakerState.OPEN if breaker.probe is None else BreakerState.HALF_OPEN
            for model_id, breaker in self._breakers.items()
            if breaker.times > 0
        }

    def close(self) -> None:
        """Give up what is under way."""
        for breaker in self._breakers.values():
            if breaker.probe is not None:
                breaker.probe.cancel()

    async def _probe(self, model_id: str) -> None:
        breaker = self._breakers[model_id]
        failure: AtlasError = EngineError("the probe failed")
        try:
            await self._clients.complete(model_id, _PROBE, Deadline.after(_PROBE_S))
        except InvalidRequest:
            self.answered(model_id)
        except AtlasError as error:
            failure = error
        except Exception:  # nobody awaits this task
            logger.exception("model %s: its probe failed", model_id)
        else:
            self.answered(model_id)
        finally:
            breaker.probe = None
        if self._breakers.get(model_id) is breaker:  # not answered
            self._open(model_id, breaker, failure)

    def _open(self, model_id: str, breaker: _Breaker, failure: AtlasError) -> None:
        doubled_s = _OPEN_S * 2 ** min(breaker.times, 10)  # no outage is too long for a float
        open_s = min(_LONGEST_S, doubled_s) * random.uniform(0.75, 1.25)
        if isinstance(failure, EngineBusy):
            open_s = max(open_s, failure.retry_after_s or 0.0)
        breaker.times += 1
        breaker.until_s = time.monotonic() + open_s
        logger.warning("model %s fails; its breaker is open for %.0f s", model_id, open_s)
