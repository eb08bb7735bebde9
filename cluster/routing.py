"""The router of Ray's proxies: it chooses among the replicas of all nodes.

By default a proxy fills the replicas on its own node up to `max_ongoing_requests` before it considers others. Ours
refuse before that, so they would answer 429 while others idle. This module imports nothing of the service, because it
runs in the proxies.
"""

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class AnyNode(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray is not there where types are checked
    """A router that offers two random replicas, of which Ray takes the one with fewer requests."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # before the next two, where these are full
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
