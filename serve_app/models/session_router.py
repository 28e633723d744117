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

    def _fulfill_next_pending_request(self, replica: Any, request_metadata: Any = None) -> None:
        """Give a replica to the very call that it was chosen for.

        Serve finds the call by the id of the HTTP request that it belongs to. Calls that a pattern
        makes side by side share that id, and all but one of them would wait for ever.
        """
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                self._record_queue_wait_time(pending)
                pending.future.set_result(replica)
                self._remove_pending_request_from_indices(pending)
                return


def session_routing() -> RequestRouterConfig:
    """What a deployment is given so that its calls are routed so."""
    return RequestRouterConfig(request_router_class=f"{__name__}:{SessionRouter.__name__}")
