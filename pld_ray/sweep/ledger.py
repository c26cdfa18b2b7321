"""The Ledger: a Ray actor that gives each chunk of the teacher bank to one process to compute."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

# ---------------------------------------------------------------- who computes what


class Ledger:
    """A Ray actor that gives each chunk to one process at a time to compute.

    A process that dies loses its claim after LEASE seconds without a sign of life; tried again
    under the same name, it has it at once. What is computed rests for as long, so that no node
    computes it again because its network file system does not show it yet. All that is lost when
    the Ledger dies is who is at work: a chunk may then be computed twice, the same both times.
    """

    LEASE = 30.0

    def __init__(self) -> None:
        # (store, chunk) -> holder ("": at rest), until when
        self.claims: dict[tuple[str, str], tuple[str, float]] = {}
        self.released = asyncio.Condition()

    async def claim(
        self, store: str, chunks: list[str], holder: str, patience: float
    ) -> str | None:
        """The first of `chunks` that nobody computes or has just computed, now `holder`'s.

        None if there is none, after a release or `patience` seconds: time to look at the store.
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
        """A sign of life of who computes the chunk."""
        if self._holds(store, chunk, holder):
            self._set(store, chunk, holder)

    async def release(self, store: str, chunk: str, holder: str, computed: bool) -> None:
        """The chunk is in the store, or could not be computed."""
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


def open_ledger() -> Any:
    """The cluster's Ledger, made if there is none; it outlives the driver that made it."""
    import ray

    from pld_ray import __version__

    return (
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
