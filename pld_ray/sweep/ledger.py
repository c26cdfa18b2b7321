"""The Ledger: a Ray actor that gives each chunk of the teacher bank to one process to compute."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import ray

from pld_ray import __version__


class Ledger:
    """A Ray actor that gives each chunk to one process at a time to compute.

    A process that dies loses its claim after LEASE seconds without a sign of life. If it is tried
    again under the same name, it gets the claim back at once. A chunk that has been computed is not
    given out for LEASE seconds, because a network file system may not show it yet. If the Ledger
    dies, only the claims are lost: a chunk may be computed twice, with the same result.
    """

    LEASE = 30.0

    def __init__(self) -> None:
        # (store, chunk) -> holder ("": at rest), until when
        self.claims: dict[tuple[str, str], tuple[str, float]] = {}
        self.released = asyncio.Condition()

    async def claim(
        self, store: str, chunks: list[str], holder: str, patience: float
    ) -> str | None:
        """Claim the first chunk that no other process computes or has just computed.

        Args:
            store: The URI of the store.
            chunks: Names of chunks, in the order in which they are needed.
            holder: The name of the process that asks.
            patience: The longest time to wait for a release, in seconds.

        Returns:
            The name of the chunk, or None if no chunk is free: the caller then looks in the store
            again.
        """
        async with self.released:
            for chunk in chunks:
                owner, until = self.claims.get((store, chunk), (holder, 0.0))
                if owner == holder or until < time.monotonic():
                    self._set(store, chunk, holder)
                    return chunk
                if owner == "" and chunk == chunks[0]:
                    patience = min(patience, 0.02)  # it is there, or about to be seen
            with suppress(TimeoutError):
                await asyncio.wait_for(self.released.wait(), patience)
        return None

    async def renew(self, store: str, chunk: str, holder: str) -> None:
        """Extend the claim of the process that computes the chunk."""
        if self._holds(store, chunk, holder):
            self._set(store, chunk, holder)

    async def release(self, store: str, chunk: str, holder: str, computed: bool) -> None:
        """End a claim: the chunk is in the store, or could not be computed."""
        async with self.released:
            if self._holds(store, chunk, holder):
                if computed:
                    self._set(store, chunk, "")
                else:
                    del self.claims[store, chunk]
            now = time.monotonic()
            self.claims = {key: claim for key, claim in self.claims.items() if claim[1] > now}
            self.released.notify_all()

    def _holds(self, store: str, chunk: str, holder: str) -> bool:
        return self.claims.get((store, chunk), ("", 0.0))[0] == holder

    def _set(self, store: str, chunk: str, holder: str) -> None:
        self.claims[store, chunk] = holder, time.monotonic() + self.LEASE


class LedgerClient:
    """The Ledger as the teacher bank calls it; `actor` is the handle of the Ray actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def claim(self, store: str, chunks: list[str], holder: str, patience: float) -> str | None:
        """See `Ledger.claim`."""
        return ray.get(self.actor.claim.remote(store, chunks, holder, patience))

    def renew(self, store: str, chunk: str, holder: str) -> None:
        """See `Ledger.renew`. Returns at once."""
        self.actor.renew.remote(store, chunk, holder)

    def release(self, store: str, chunk: str, holder: str, computed: bool) -> None:
        """See `Ledger.release`. Returns at once."""
        self.actor.release.remote(store, chunk, holder, computed)


def open_ledger() -> LedgerClient:
    """Return the Ledger of the cluster. It is made if there is none, and outlives the driver."""
    actor = (
        ray.remote(Ledger)
        .options(
            name=f"ledger {__version__}",
            namespace="pld-ray",
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote()
    )
    return LedgerClient(actor)
