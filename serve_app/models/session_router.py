"""Which replica of a model gets a call: those of a session the same one, whose prefix cache has it.

Serve loads the class by its import path wherever a handle to a model's application is made.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


class SessionRouter(ConsistentHashRouter):  # type: ignore[misc]  # Ray is untyped
    """Serve's consistent hash for calls with a session; the less busy one of two for the others.

    The consistent hash alone spreads calls without a session by chance, and so worse than Serve's
    own default does.
    """

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Replicas to try, in groups: the least busy of the first group that can take the call."""
        if pending_request is None or pending_request.metadata.session_id:
            ranked: list[list[Any]] = await super().choose_replicas(
                candidate_replicas, pending_request
            )
            return ranked
        pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


def session_routing() -> RequestRouterConfig:
    """What a deployment is given so that its calls are routed so."""
    return RequestRouterConfig(request_router_class=f"{__name__}:{SessionRouter.__name__}")
