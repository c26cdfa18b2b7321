"""Compare the CPUs and GPUs that a trial needs with those of the cluster's nodes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import ray

from pld_ray.config.parts import Resources
from pld_ray.config.trial import Trial


@dataclass(frozen=True)
class ResourceRequest:
    """The resources of a trial. Each of its workers runs on a single node.

    Attributes:
        cpus: CPUs per worker.
        gpus: GPUs per worker. A fraction below 1 is a share of one GPU.
        workers: Number of workers.
    """

    cpus: float
    gpus: float
    workers: int

    @property
    def worker(self) -> dict[str, float]:
        """The resources of one worker, under Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus}

    @property
    def with_whole_gpus(self) -> ResourceRequest:
        """The request with a whole GPU for each worker that has a share of one."""
        return replace(self, gpus=math.ceil(self.gpus))

    def fits(self, nodes: list[dict[str, float]]) -> bool:
        """Return whether the nodes have room for all workers when nothing else runs on them."""
        return sum(self.workers_on(node) for node in nodes) >= self.workers

    def groups_on(self, nodes: list[dict[str, float]]) -> int:
        """Return how many such requests fit on the nodes when nothing else runs there, about."""
        return sum(self.workers_on(node) for node in nodes) // self.workers

    def workers_on(self, node: dict[str, float]) -> int:
        """Return how many workers fit on a node when nothing else runs on it."""
        rooms = [node.get("CPU", 0.0) / self.cpus] if self.cpus else []
        if self.gpus:  # a worker with a fraction of a GPU cannot be split over two GPUs
            each = int(1 / self.gpus + 1e-6) if self.gpus < 1 else 1 / self.gpus
            rooms.append(node.get("GPU", 0.0) * each)
        return int(min(rooms) + 1e-6)

    def refused(self, what: str) -> str | None:
        """Explain why no cluster can run the workers; return None if one can.

        Args:
            what: Subject of the message, as for `too_large`.
        """
        if self.workers == 1 or not 0 < self.gpus < 1:
            return None
        return (
            f"{what} has {self.workers} workers with {self.gpus:g} GPUs each, but the workers of a "
            "trial cannot share a GPU (NCCL): expected resources.gpus_per_worker: 1, or 0 for CPUs"
        )

    def too_large(self, what: str, nodes: list[dict[str, float]]) -> str | None:
        """Explain why the workers do not fit on the nodes, even if nothing else runs there.

        Args:
            what: Subject of the message, such as "trial 0123 (KD)".
            nodes: Resources of each node, under Ray's names.

        Returns:
            A message, or None if the workers fit.
        """
        if (why := self.refused(what)) or self.fits(nodes):
            return why
        kinds = [kind for kind, n in self.worker.items() if n]
        has = Counter(" and ".join(f"{node.get(k, 0):g} {k}s" for k in kinds) for node in nodes)
        return (
            f"{what} needs {self}, and the nodes of the cluster have "
            f"{'; '.join(f'{text} ({n} of them)' if n > 1 else text for text, n in has.items())}: "
            "change workers or resources, or join a larger cluster"
        )

    def __str__(self) -> str:
        each = " and ".join(f"{n:g} {kind}s" for kind, n in self.worker.items() if n)
        return f"{each} for each of its {self.workers} workers" if self.workers > 1 else each


def resolved(resources: Resources) -> Resources:
    """Fill in the defaults: one GPU per worker if the cluster has any, and the CPUs of its share.

    One GPU of a node with 16 CPUs and 2 GPUs has 8 CPUs, half a GPU has 4. Of the nodes that have
    room for a worker, the one with the fewest CPUs for each GPU counts. A worker without GPUs has
    one CPU.
    """
    having = [node for node in nodes() if node.get("GPU")]
    gpus, cpus = resources.gpus_per_worker, resources.cpus_per_worker
    gpus = float(bool(having)) if gpus is None else gpus
    if cpus is None:
        room = [node for node in having if node["GPU"] >= gpus and node.get("CPU", 0.0) >= 1]
        shares = [node["CPU"] / node["GPU"] * gpus for node in room]
        cpus = max(1.0, float(int(min(shares, default=0.0) + 1e-6)))
    return resources.model_copy(update={"gpus_per_worker": gpus, "cpus_per_worker": cpus})


def need(trial: Trial, resources: Resources) -> ResourceRequest:
    """Return the resources that a trial requests; `resources` comes from `resolved`."""
    assert resources.cpus_per_worker is not None and resources.gpus_per_worker is not None
    return ResourceRequest(resources.cpus_per_worker, resources.gpus_per_worker, trial.workers)


def nodes() -> list[dict[str, float]]:
    """Return the total resources of each node that is alive, under Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
