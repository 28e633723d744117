"""First requests to a model and to its pairs: a candidate is one only after it has answered."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from serve_app.budget import Budget, Deadline
from serve_app.content import BLANK_PICTURE, with_pictures
from serve_app.errors import AtlasError, NoAnswer
from serve_app.models.clients import ModelClients
from serve_app.models.protocol import ChatBody
from serve_app.orchestrator.pairs.base import PairWork
from serve_app.orchestrator.pairs.runner import PairRunner
from serve_app.orchestrator.recovery import again
from serve_app.orchestrator.trace import Trace
from serve_app.schemas import ChatCall, Limits, Pair

logger = logging.getLogger(__name__)

WARM_UP_TIMEOUT_S = 60.0
_GREETING: dict[str, Any] = {"role": "user", "content": "Hello."}
_SHOWING: dict[str, Any] = {"role": "user", "content": with_pictures("Hello.", [BLANK_PICTURE])}


async def greet(clients: ModelClients, model_id: str, deadline: Deadline) -> None:
    """Have a model answer; a replica that dies over it says nothing of the others.

    Raises:
        AtlasError: If it does not.
    """
    body: ChatBody = {"messages": [_GREETING], "max_tokens": 1}
    ask = functools.partial(clients.complete, model_id, body, deadline)
    await again(ask, deadline, max_deaths=sys.maxsize)


async def compile_logprobs(clients: ModelClients, model_id: str) -> None:
    """Ask once for log-probabilities: the first such request takes vLLM up to 12 s to compile.

    A model that has none, or is slow, is no worse for it.
    """
    body: ChatBody = {"messages": [_GREETING], "max_tokens": 1, "logprobs": True}
    try:
        await clients.complete(model_id, body, Deadline.after(WARM_UP_TIMEOUT_S))
    except AtlasError as error:
        logger.info("model %s: no log-probabilities: %s", model_id, error.message)


async def why_silent(pairs: PairRunner, pair: Pair) -> str | None:
    """Run a pair on a greeting; why it does not answer, if it does not."""
    call = ChatCall(
        request_id="warm-up",
        model=str(pair),
        messages=(_SHOWING if pairs.reads_pictures(pair.tool_id) else _GREETING,),
        sampling={"max_tokens": 1},
        limits=Limits(alpha=0.0, deadline_s=WARM_UP_TIMEOUT_S),
    )
    budget, trace = Budget(Deadline.after(WARM_UP_TIMEOUT_S)), Trace(call.request_id)
    try:
        await pairs.run(PairWork(pair, call, budget, trace.root))
    except NoAnswer:
        pass  # it answers; one token is too short for a call
    except AtlasError as error:
        logger.warning("pair %s does not answer: %s", pair, error.message)
        return error.message
    return None
