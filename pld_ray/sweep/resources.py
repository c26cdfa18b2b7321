"""CPUs and GPUs: what a trial needs and what the nodes of the cluster have."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import ray

from pld_ray.config.trial import Resources, Trial


@dataclass(frozen=True)
class ResourceRequest:
    """What a trial takes: so much for each of its workers, each of which lives on one node."""

    cpus: float
    gpus: float
    workers: int

    @property
    def worker(self) -> dict[str, float]:
        """Of one worker, by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus}

    def fits(self, nodes: list[dict[str, float]]) -> bool:
        """Whether nodes, were they free, have room for all workers."""
        return sum(self.workers_on(node) for node in nodes) >= self.workers

    def workers_on(self, node: dict[str, float]) -> int:
        """How many workers a node has room for."""
        rooms = [node.get("CPU", 0.0) / self.cpus] if self.cpus else []
        if self.gpus:  # a fraction is of one GPU, what is left of it is nothing to a larger one
            each = int(1 / self.gpus + 1e-6) if self.gpus < 1 else 1 / self.gpus
            rooms.append(node.get("GPU", 0.0) * each)
        return int(min(rooms) + 1e-6)

    def too_large(self, what: str, nodes: list[dict[str, float]]) -> str | None:
        """Why `what` has no room even on free nodes, in a sentence; None if it has."""
        if self.fits(nodes):
            return None
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
    """With a GPU for each worker where the cluster has any, unless it is said."""
    if resources.gpus_per_worker is not None:
        return resources
    gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    return resources.model_copy(update={"gpus_per_worker": gpus})


def need(trial: Trial, resources: Resources) -> ResourceRequest:
    """What a trial takes of `resolved` resources."""
    return ResourceRequest(
        resources.cpus_per_worker, resources.gpus_per_worker or 0.0, trial.workers
    )


def nodes() -> list[dict[str, float]]:
    """What each node of the cluster has that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
