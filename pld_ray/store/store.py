"""Where finished and unfinished work lies. Only this file knows the layout:

    ROOT/trials/ID/trial.json           the spec, written when the trial starts
                   epochs.jsonl         one line of metrics an epoch
                   checkpoint.pt        everything needed to go on after one of them
                   student.safetensors  the trained weights
                   record.json          written last: it exists only if the trial has finished
                   failure.json         why the last attempt failed, if it did
                   stopped.json         where a search stopped it, if one did
                   landscape.json       the loss around the trained weights, if it was asked for
    ROOT/searches/KEY/N.json            a point that a search has drawn (search.py)
    ROOT/banks/KEY/bank.json            whose logits, on which images
                   VIEW/CHUNK.KIND      some of them (bank.py)

Whatever is read is checked by a checksum kept with it. What is damaged counts as not there: a
trial is then run again, or goes on from its start.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pld_ray.config.trial import Trial
from pld_ray.errors import InputError
from pld_ray.store.files import Files

if TYPE_CHECKING:
    from torch import Tensor
from pld_ray.store.documents import from_document, parse_epochs, parse_record, to_document


@dataclass(frozen=True)
class Outcome:
    """What there is of a trial; see the methods of the same names."""

    record: dict[str, Any] | None
    epochs: list[dict[str, Any]]
    failure: dict[str, Any] | None
    stopped: dict[str, Any] | None

    def state(self, epochs: int) -> str:
        """For people: how far it is, of so many epochs."""
        if self.record is not None:
            return "done"
        if self.failure is not None:
            return f"FAILED: {self.failure['reason']}"
        if self.stopped is not None:
            by = self.stopped["by"].replace("_", " ")
            return f"stopped by {by} after {self.stopped['epoch']}/{epochs} epochs"
        return f"{len(self.epochs)}/{epochs} epochs" if self.epochs else "not begun"


class Store:
    """Trial folders and teacher banks under a local folder or a URI (s3://, gs://, abfs://)."""

    def __init__(self, root: str | Path) -> None:
        self.files = Files(root)
        self.uri, self.local = self.files.uri, self.files.local

    # ---- what a trial writes

    def start(self, trial: Trial) -> None:
        """Write the spec, before anything else of the trial."""
        text = trial.model_dump_json(indent=1) + "\n"
        self.files.write(f"trials/{trial.id}/trial.json", text.encode())

    def checkpoint(self, trial: Trial, state: dict[str, Any]) -> None:
        """Keep all that is needed to go on."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        digest = hashlib.sha256(content).digest()
        self.files.write(f"trials/{trial.id}/checkpoint.pt", content + digest)

    def log(self, trial: Trial, history: list[dict[str, Any]]) -> None:
        """Keep the metrics of every epoch so far."""
        lines = "".join(json.dumps(epoch) + "\n" for epoch in history)
        self.files.write(f"trials/{trial.id}/epochs.jsonl", lines.encode())

    def finish(self, trial: Trial, record: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """The student's weights, then the record; the checkpoint is not needed any more."""
        from safetensors.torch import save

        contiguous = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
        content = save(contiguous)
        self.files.write(f"trials/{trial.id}/student.safetensors", content)
        digest = hashlib.sha256(content).hexdigest()
        self._write_json(f"trials/{trial.id}/record.json", record | {"weights_sha256": digest})
        for name in ("checkpoint.pt", "failure.json", "stopped.json"):
            self.files.delete(f"trials/{trial.id}/{name}")

    def fail(self, trial_id: str, reason: str, traceback: str = "", final: bool = False) -> None:
        """Say why an attempt failed, and whether another would too; the checkpoint stays."""
        failure = {"reason": reason, "final": final, "traceback": traceback.splitlines()}
        self._write_json(f"trials/{trial_id}/failure.json", failure)

    def stop(self, trial: Trial, by: str) -> None:
        """A search has stopped the trial: its record so far. It may go on from its checkpoint."""
        history = self.epochs(trial.id)
        record = {
            "id": trial.id,
            "trial": trial.model_dump(mode="json"),
            "by": by,
            "epoch": len(history),
            "metrics": history[-1] if history else {},
        }
        self._write_json(f"trials/{trial.id}/stopped.json", record)

    def keep_landscape(self, trial: Trial, found: dict[str, Any]) -> None:
        """Keep the loss around the trained weights (analysis.weight_space)."""
        self._write_json(f"trials/{trial.id}/landscape.json", found)

    def forget_failure(self, trial: Trial) -> None:
        """A new attempt begins."""
        self.files.delete(f"trials/{trial.id}/failure.json")

    # ---- what others read

    def record(self, trial_id: str) -> dict[str, Any] | None:
        """The record of a finished trial, or None."""
        return parse_record(self.files.read(f"trials/{trial_id}/record.json"))

    def records(self, trial_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The records of those of the trials that have one."""
        found = self._read_all(trial_ids, "record.json")
        records = {
            key: parse_record(contents.get("record.json")) for key, contents in found.items()
        }
        return {key: record for key, record in records.items() if record is not None}

    def finished(self, trial_ids: Iterable[str]) -> set[str]:
        """Those of the trials that have a record."""
        return set(self.records(trial_ids))

    def outcomes(self, trial_ids: Iterable[str]) -> dict[str, Outcome]:
        """What there is of each of the trials."""
        names = ("record.json", "epochs.jsonl", "failure.json", "stopped.json")
        return {
            key: Outcome(
                parse_record(contents.get("record.json")),
                parse_epochs(contents.get("epochs.jsonl", b"")),
                from_document(contents.get("failure.json", b"")),
                from_document(contents.get("stopped.json", b"")),
            )
            for key, contents in self._read_all(trial_ids, *names).items()
        }

    def _read_all(self, trial_ids: Iterable[str], *names: str) -> dict[str, dict[str, bytes]]:
        """Some files of many trials; from an object store many at a time."""
        ids = list(dict.fromkeys(trial_ids))
        found = self.files.read_many(f"trials/{key}/{name}" for key in ids for name in names)
        return {
            key: {name: found[path] for name in names if (path := f"trials/{key}/{name}") in found}
            for key in ids
        }

    def trials(self) -> dict[str, Trial]:
        """All trials that have begun, of whatever experiment."""
        names = (path.split("/") for path in self.files.listed("trials"))
        paths = [f"trials/{parts[0]}/trial.json" for parts in names if parts[1:] == ["trial.json"]]
        found: dict[str, Trial] = {}
        for content in self.files.read_many(paths).values():
            with suppress(ValidationError):
                trial = Trial.model_validate_json(content)
                found[trial.id] = trial
        return found

    def failure(self, trial_id: str) -> dict[str, Any] | None:
        """reason and traceback of the last attempt if it failed."""
        return self._read_json(f"trials/{trial_id}/failure.json")

    def stopped(self, trial_id: str) -> dict[str, Any] | None:
        """What `stop` kept, or None; a trial that went on and finished has a record instead."""
        return self._read_json(f"trials/{trial_id}/stopped.json")

    def landscape(self, trial_id: str) -> dict[str, Any] | None:
        """What `keep_landscape` kept, or None."""
        return self._read_json(f"trials/{trial_id}/landscape.json")

    def epochs(self, trial_id: str) -> list[dict[str, Any]]:
        """The metrics of every epoch so far; none where the file is damaged."""
        return parse_epochs(self.files.read(f"trials/{trial_id}/epochs.jsonl") or b"")

    def load_checkpoint(self, trial: Trial) -> dict[str, Any] | None:
        """The state last kept by `checkpoint`, or None: also where the file is damaged."""
        import torch

        content = self.files.read(f"trials/{trial.id}/checkpoint.pt") or b""
        state, digest = content[:-32], content[-32:]
        if hashlib.sha256(state).digest() != digest:
            return None
        try:
            return torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
        except Exception:  # not what `checkpoint` writes: it may hold code, which is never run
            return None

    def intact(self, trial: Trial) -> bool:
        """Whether the weights of a finished trial are what its record says.

        If they are not, its record is deleted: the trial is to run again.
        """
        return self._weights(trial) is not None

    def load_weights(self, trial: Trial) -> dict[str, Tensor]:
        """The trained weights of a finished trial; InputError if they are missing or damaged."""
        from safetensors.torch import load

        return load(self.weights(trial))

    def weights(self, trial: Trial) -> bytes:
        """The same as the safetensors file that they are kept as."""
        content = self._weights(trial)
        if content is None:
            raise InputError(
                f"{self.folder(trial.id)}/student.safetensors: not what its record says (damaged "
                f"or missing): run the experiment again to train {trial.label} anew"
            )
        return content

    def _weights(self, trial: Trial) -> bytes | None:
        content = self.files.read(f"trials/{trial.id}/student.safetensors") or b""
        if hashlib.sha256(content).hexdigest() == self.weights_digest(trial):
            return content
        self.files.delete(f"trials/{trial.id}/record.json")
        return None

    def weights_digest(self, trial: Trial) -> str:
        """The sha256 of a finished trial's weights, as its record has it."""
        record = self.record(trial.id)
        if record is None:
            raise InputError(f"trial {trial.id} ({trial.label}) has not finished in {self.uri}")
        return record["weights_sha256"]

    def folder(self, trial_id: str) -> str:
        """Where the trial lies, for messages."""
        return self.files.place(f"trials/{trial_id}")

    # ---- searches

    def add_point(self, key: str, number: int, values: list[Any]) -> bool:
        """Keep the next point of a search; False if another driver was first with this number."""
        content = to_document({"values": values})
        return self.files.create(f"searches/{key}/{number}.json", content)

    def points(self, key: str) -> list[list[Any] | None]:
        """The points of a search in their order; None where one is damaged."""
        names = self.files.listed(f"searches/{key}")
        numbers = [int(name.removesuffix(".json")) for name in names]
        paths = [f"searches/{key}/{number}.json" for number in range(max(numbers, default=-1) + 1)]
        contents = self.files.read_many(paths)
        kept = [from_document(contents.get(path, b"")) for path in paths]
        return [None if point is None else point["values"] for point in kept]

    # ---- the teacher bank

    def start_bank(self, key: str, about: dict[str, Any]) -> None:
        """Say what a bank holds, before anything else of it."""
        if self.bank(key) is None:
            self._write_json(f"banks/{key}/bank.json", about)

    def bank(self, key: str) -> dict[str, Any] | None:
        """What a bank holds, or None if there is none."""
        return self._read_json(f"banks/{key}/bank.json")

    def banks(self) -> dict[str, dict[str, int]]:
        """Of each bank, by key, its files VIEW/CHUNK.KIND and their bytes."""
        found: dict[str, dict[str, int]] = {}
        for path, size in self.files.listed("banks").items():
            key, _, name = path.partition("/")
            found.setdefault(key, {})[name] = size
        return found

    def drop_bank(self, key: str) -> None:
        """Delete a bank; a trial that is using it computes again what it still needs."""
        self.files.delete_folder(f"banks/{key}")

    def write_chunk(self, name: str, content: bytes) -> None:
        """Keep a chunk of a bank; `name` is KEY/VIEW/CHUNK.KIND."""
        self.files.write(f"banks/{name}", content)

    def read_chunk(self, name: str) -> npt.NDArray[np.uint8] | None:
        """The bytes of a chunk, or None; a local file is mapped, not read."""
        return self.files.map(f"banks/{name}")

    def missing_chunks(self, names: list[str]) -> list[str]:
        """Those that are not in the store, in their order."""
        return self.files.missing("banks", names)

    def drop_chunk(self, name: str) -> None:
        """Delete a chunk, because it is damaged."""
        self.files.delete(f"banks/{name}")

    # ---- JSON with a checksum

    def _write_json(self, path: str, value: dict[str, Any]) -> None:
        self.files.write(path, to_document(value))

    def _read_json(self, path: str) -> dict[str, Any] | None:
        content = self.files.read(path)
        return None if content is None else from_document(content)
