"""Which replica of a model gets a call: those of a session the same one, whose prefix cache has it.

Serve loads the class by its import path wherever a handle to a model's application is made.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.config import RequestRouterConfig

_MOST_TRIED = 3
"""Replicas that a call with a session may go to: its own, and where that is full the next ones."""


class SessionRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Rendezvous hashing for calls with a session; Serve's default for the others.

    Not Serve's own consistent hash: that one finds a call by the id of the HTTP request that it
    belongs to. Calls that a pattern makes side by side share that id, and some would wait for ever.
    """

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Replicas to try, in groups: the least busy of the first group that can take the call."""
        session = "" if pending_request is None else pending_request.metadata.session_id
        if not session:
            default: list[list[Any]] = await super().choose_replicas(
                candidate_replicas, pending_request
            )
            return default
        pending_request.routing_context.should_backoff = True

        def weight(replica: Any) -> bytes:
            return hashlib.sha256(f"{session}\n{replica.replica_id.unique_id}".encode()).digest()

        return [[replica] for replica in sorted(candidate_replicas, key=weight)[:_MOST_TRIED]]

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> Any:
        """The call that a replica was chosen for; `None`: it has one, and the next is served."""
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                return pending
        return None


def session_routing() -> RequestRouterConfig:
    """What a deployment is given so that its calls are routed so."""
    return RequestRouterConfig(request_router_class=f"{__name__}:{SessionRouter.__name__}")
