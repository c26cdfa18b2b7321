"""The store of trials, searches and teacher banks. Only this file knows the layout:

    ROOT/trials/ID/trial.json           the settings, written when the trial starts
                   epochs.jsonl         one line of metrics per epoch
                   checkpoint.pt        the state after the last epoch, to resume from
                   student.safetensors  the trained weights
                   record.json          written last: it exists only if the trial has finished
                   failure.json         why the last attempt failed, if it failed
                   stopped.json         where a search stopped the trial, if it did
                   landscape.json       the loss around the trained weights, if it was computed
    ROOT/index/FILE.parquet         copies of these files, to read many trials fast (index.py)
    ROOT/plugins/NAME-DIGEST.zip        the source of a plug-in that trials use
    ROOT/data/FINGERPRINT.json          a dataset on which trials were trained, and where it was
    ROOT/imported/NAME.csv              results from elsewhere (analysis/records/imported.py)
    ROOT/searches/KEY/N.json            a point that a search has drawn (search.py)
    ROOT/banks/KEY/bank.json            the description of a bank: whose logits, on which images
                   VIEW/CHUNK.KIND      a part of the logits (bank.py)

Records, weights, checkpoints and banks are verified by their checksums when they are read. Damaged
files are treated as missing and recomputed: the trial runs again, or starts from its first epoch.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from pydantic_core import from_json, to_json

from pld_ray import plugins
from pld_ray.config.trial import SEEDS, Trial
from pld_ray.errors import InputError
from pld_ray.plugins import Plugin
from pld_ray.store import index
from pld_ray.store.files import Files
from pld_ray.store.outcomes import OUTCOME, Outcome

if TYPE_CHECKING:
    from torch import Tensor
from pld_ray.store.documents import (
    SOUND,
    from_document,
    parse_epochs,
    parse_record,
    parse_sound,
    to_document,
    to_lines,
)


class Store:
    """Trials, searches and teacher banks under one root.

    Args:
        root: A local folder, or a URI (s3://, gs://, abfs://).

    Raises:
        InputError: The root is not valid, or the package for its protocol is not installed.
    """

    def __init__(self, root: str | Path) -> None:
        self.files = Files(root)
        self.uri, self.local = self.files.uri, self.files.local

    # ---- written by trials

    def start(self, trial: Trial) -> None:
        """Write the settings of a trial, before any other file of the trial."""
        text = trial.model_dump_json(indent=1) + "\n"
        self.files.write(f"trials/{trial.id}/trial.json", text.encode())

    def checkpoint(self, trial: Trial, state: dict[str, Any]) -> None:
        """Write the state from which a trial can resume.

        Args:
            trial: The trial.
            state: Tensors and plain values, as `torch.save` takes them.
        """
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        digest = hashlib.sha256(content).digest()
        self.files.write(f"trials/{trial.id}/checkpoint.pt", content + digest)

    def log(self, trial: Trial, history: list[dict[str, Any]]) -> None:
        """Write the metrics of every epoch so far."""
        self.files.write(f"trials/{trial.id}/epochs.jsonl", to_lines(history))

    def finish(self, trial: Trial, record: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Write the student's weights and then the record, and delete the checkpoint.

        Args:
            trial: The trial.
            record: The metrics and other results; the SHA-256 of the weights is added.
            weights: The state dict of the student.
        """
        from safetensors.torch import save

        contiguous = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
        content = save(contiguous)
        self.files.write(f"trials/{trial.id}/student.safetensors", content)
        digest = hashlib.sha256(content).hexdigest()
        self._write_json(f"trials/{trial.id}/record.json", record | {"weights_sha256": digest})
        for name in ("checkpoint.pt", "failure.json", "stopped.json"):
            self.files.delete(f"trials/{trial.id}/{name}")

    def fail(self, trial_id: str, reason: str, traceback: str = "", final: bool = False) -> None:
        """Write why an attempt failed; the checkpoint is kept.

        Args:
            trial_id: The id of the trial.
            reason: The reason, in one sentence.
            traceback: The Python traceback.
            final: Whether another attempt would fail in the same way.
        """
        failure = {"reason": reason, "final": final, "traceback": traceback.splitlines()}
        self._write_json(f"trials/{trial_id}/failure.json", failure)

    def stop(self, trial: Trial, by: str) -> None:
        """Write that a search has stopped a trial; the trial can resume from its checkpoint.

        Args:
            trial: The trial.
            by: The name of the scheduler, or "time_budget".
        """
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
        """Write the loss around the trained weights (see `analysis.landscapes`)."""
        self._write_json(f"trials/{trial.id}/landscape.json", found)

    def forget_failure(self, trial: Trial) -> None:
        """Delete the failure of the last attempt, because a new attempt starts."""
        self.files.delete(f"trials/{trial.id}/failure.json")

    def forget_stop(self, trial: Trial) -> None:
        """Delete that a search has stopped a trial, because it continues."""
        self.files.delete(f"trials/{trial.id}/stopped.json")

    # ---- results of trials

    def record(self, trial_id: str) -> dict[str, Any] | None:
        """Return the record of a finished trial, or None."""
        return parse_record(self.files.read(f"trials/{trial_id}/record.json"))

    def records(self, trial_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the records of the finished trials, by id; other trials are left out."""
        found = self._read_all(trial_ids, "record.json")
        return {
            key: parse_sound(files["record.json"])
            for key, files in found.items()
            if "record.json" in files
        }

    def finished(self, trial_ids: Iterable[str]) -> set[str]:
        """Return the ids of the trials that have a record."""
        found = self._read_all(trial_ids, "record.json")
        return {key for key, files in found.items() if files}

    def outcomes(self, trial_ids: Iterable[str]) -> dict[str, Outcome]:
        """Return the stored results of each trial, by id."""
        found = self._read_all(trial_ids, *OUTCOME)
        return {key: Outcome(files) for key, files in found.items()}

    def epoch_lines(self, trial_ids: Iterable[str]) -> dict[str, bytes]:
        """Return the epochs of each trial that has some, as lines of JSON, by id."""
        found = self._read_all(trial_ids, "epochs.jsonl")
        return {key: files["epochs.jsonl"] for key, files in found.items() if files}

    def _read_all(self, trial_ids: Iterable[str], *names: str) -> dict[str, dict[str, bytes]]:
        """Return the content of the named files of many trials, by id and then by name.

        Files that are missing or damaged are left out.
        """
        ids = list(dict.fromkeys(trial_ids))
        found = index.read_many(self.files, ids, {name: SOUND[name] for name in names})
        return {
            key: {name: found[path] for name in names if (path := f"trials/{key}/{name}") in found}
            for key in ids
        }

    def trial(self, trial_id: str) -> Trial | None:
        """Return a trial that has started, after its plug-ins are imported; None without it."""
        settings = _parsed(self.files.read(f"trials/{trial_id}/trial.json") or b"")
        if not isinstance(settings, dict):
            return None
        self.load_plugins(settings)
        with suppress(ValidationError):
            return Trial.model_validate(settings)
        return None

    def trials(self, with_plugins: bool = False) -> dict[str, Trial]:
        """Return all trials that have started, by id, from all experiments.

        Trials whose settings are damaged are left out.

        Args:
            with_plugins: Whether to import the plug-ins that trials use. Without, trials whose loss
                or schedule comes from a plug-in that is not imported are left out.
        """
        found: dict[str, Trial] = {}
        shared: dict[bytes, Trial] = {}  # by the settings without the seed
        for files in self._read_all(self.files.folders("trials"), "trial.json").values():
            settings = from_json(files["trial.json"]) if files else {}
            if with_plugins:
                self.load_plugins(settings)
            seed = settings.pop("seed", 0)
            if not isinstance(seed, int) or not 0 <= seed < SEEDS:
                continue
            key = to_json(settings)
            with suppress(ValidationError):
                if key not in shared:
                    shared[key] = Trial.model_validate(settings)
                trial = shared[key].with_seed(seed)
                found[trial.id] = trial
        return found

    def failure(self, trial_id: str) -> dict[str, Any] | None:
        """Return the reason and traceback of the last attempt if it failed, else None."""
        return self._read_json(f"trials/{trial_id}/failure.json")

    def stopped(self, trial_id: str) -> dict[str, Any] | None:
        """Return what `stop` wrote, or None.

        If the trial resumes and finishes, it has a record instead.
        """
        return self._read_json(f"trials/{trial_id}/stopped.json")

    def landscape(self, trial_id: str) -> dict[str, Any] | None:
        """Return what `keep_landscape` wrote, or None."""
        return self._read_json(f"trials/{trial_id}/landscape.json")

    def epochs(self, trial_id: str) -> list[dict[str, Any]]:
        """Return the metrics of every epoch so far; the list is empty if the file is damaged."""
        return parse_epochs(self.files.read(f"trials/{trial_id}/epochs.jsonl") or b"")

    def load_checkpoint(self, trial: Trial) -> dict[str, Any] | None:
        """Return the last state that `checkpoint` wrote, or None if it is missing or damaged."""
        import torch

        content = self.files.read(f"trials/{trial.id}/checkpoint.pt") or b""
        state, digest = content[:-32], content[-32:]
        if hashlib.sha256(state).digest() != digest:
            return None
        try:
            return torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
        except Exception:  # `checkpoint` did not write this file; code inside it is never run
            return None

    def intact(self, trial: Trial) -> bool:
        """Return whether the weights of a finished trial match its record.

        If they do not match, the record is deleted, so that the trial runs again.

        Raises:
            InputError: The trial has not finished.
        """
        return self._weights(trial) is not None

    def load_weights(self, trial: Trial) -> dict[str, Tensor]:
        """Return the trained weights of a finished trial.

        Raises:
            InputError: The weights are missing or damaged, or the trial has not finished.
        """
        from safetensors.torch import load

        return load(self.weights(trial))

    def weights(self, trial: Trial) -> bytes:
        """Return the trained weights of a finished trial as the bytes of a safetensors file.

        Raises:
            InputError: The weights are missing or damaged, or the trial has not finished.
        """
        content = self._weights(trial)
        if content is None:
            raise InputError(
                f"{self.folder(trial.id)}/student.safetensors: missing or damaged (its SHA-256 is "
                f"not the one in the record): run the experiment again to train {trial.label}"
            )
        return content

    def _weights(self, trial: Trial) -> bytes | None:
        """Return the weights file if it matches the record; else delete the record."""
        content = self.files.read(f"trials/{trial.id}/student.safetensors") or b""
        if hashlib.sha256(content).hexdigest() == self.weights_digest(trial):
            return content
        self.files.delete(f"trials/{trial.id}/record.json")
        return None

    def weights_digest(self, trial: Trial) -> str:
        """Return the SHA-256 of a finished trial's weights, as in its record.

        Raises:
            InputError: The trial has not finished.
        """
        record = self.record(trial.id)
        if record is None:
            raise InputError(f"trial {trial.id} ({trial.label}) has not finished in {self.uri}")
        return record["weights_sha256"]

    def folder(self, trial_id: str) -> str:
        """Return the path of a trial's folder, for messages."""
        return self.files.place(f"trials/{trial_id}")

    # ---- datasets

    def keep_dataset(self, about: dict[str, Any]) -> None:
        """Write the description of a dataset with a fingerprint; an earlier one is replaced."""
        self._write_json(f"data/{about['fingerprint']}.json", about)

    def datasets(self) -> list[dict[str, Any]]:
        """Return the descriptions of all datasets; damaged ones are left out."""
        paths = [f"data/{name}" for name in self.files.listed("data")]
        found = [from_document(content) for content in self.files.read_many(paths).values()]
        return [about for about in found if about is not None]

    # ---- plug-ins

    def keep_plugin(self, plugin: Plugin) -> None:
        """Write the source of a plug-in."""
        path = f"plugins/{plugin.name}-{plugin.digest}.zip"
        if self.files.read(path) != (content := plugin.archive()):
            self.files.write(path, content)

    def plugins(self) -> dict[str, set[str]]:
        """Return the digests of the plug-ins that are kept, by the name of the plug-in."""
        found: dict[str, set[str]] = {}
        for file in self.files.listed("plugins"):
            name, _, digest = file.removesuffix(".zip").rpartition("-")
            found.setdefault(name, set()).add(digest)
        return found

    def load_plugins(self, trial: dict[str, Any]) -> None:
        """Import the plug-ins that a trial and its teachers need, from the copies that are kept.

        Args:
            trial: The settings of the trial.

        Raises:
            InputError: A copy is missing or damaged, or cannot be imported.
        """
        if isinstance(teacher := trial.get("teacher"), dict):
            self.load_plugins(teacher)
        for name, digest in trial.get("plugins", {}).items():
            if name in plugins.LOADED and plugins.LOADED[name].digest == digest:
                continue
            path = f"plugins/{name}-{digest}.zip"
            content = self.files.read(path)
            if content is None:
                raise InputError(f"{self.files.place(path)}: the copy of a plug-in is missing")
            plugins.load_archive(name, digest, content)

    # ---- searches

    def add_point(self, key: str, number: int, values: list[Any]) -> bool:
        """Write the next point of a search.

        Args:
            key: The key of the search.
            number: The index of the point, from 0.
            values: The values of the point, in the order of the searched fields.

        Returns:
            False if another driver has already written a point with this index, else True.
        """
        content = to_document({"values": values})
        return self.files.create(f"searches/{key}/{number}.json", content)

    def points(self, key: str) -> list[list[Any] | None]:
        """Return the points of a search in order; a damaged point is None."""
        names = self.files.listed(f"searches/{key}")
        numbers = [int(name.removesuffix(".json")) for name in names]
        paths = [f"searches/{key}/{number}.json" for number in range(max(numbers, default=-1) + 1)]
        contents = self.files.read_many(paths)
        kept = [from_document(contents.get(path, b"")) for path in paths]
        return [None if point is None else point["values"] for point in kept]

    # ---- the teacher bank

    def start_bank(self, key: str, about: dict[str, Any]) -> None:
        """Write the description of a bank, before any other file of the bank.

        Args:
            key: The key of the bank.
            about: The description: whose logits, on which images.
        """
        if self.bank(key) is None:
            self._write_json(f"banks/{key}/bank.json", about)

    def bank(self, key: str) -> dict[str, Any] | None:
        """Return the description of a bank, or None if there is no such bank."""
        return self._read_json(f"banks/{key}/bank.json")

    def banks(self) -> dict[str, dict[str, int]]:
        """Return the size in bytes of each file, by bank key and then by VIEW/CHUNK.KIND."""
        found: dict[str, dict[str, int]] = {}
        for path, size in self.files.listed("banks").items():
            key, _, name = path.partition("/")
            found.setdefault(key, {})[name] = size
        return found

    def drop_bank(self, key: str) -> None:
        """Delete a bank; a trial that uses the bank recomputes the logits that it still needs."""
        self.files.delete_folder(f"banks/{key}")

    def write_chunk(self, name: str, content: bytes) -> None:
        """Write a chunk of a bank.

        Args:
            name: The name of the chunk, KEY/VIEW/CHUNK.KIND.
            content: The bytes of the chunk.
        """
        self.files.write(f"banks/{name}", content)

    def read_chunk(self, name: str) -> npt.NDArray[np.uint8] | None:
        """Return the bytes of a chunk, or None; a local file is memory-mapped."""
        return self.files.map(f"banks/{name}")

    def missing_chunks(self, names: list[str]) -> list[str]:
        """Return the names of the chunks that are not in the store, in the given order."""
        return self.files.missing("banks", names)

    def drop_chunk(self, name: str) -> None:
        """Delete a damaged chunk."""
        self.files.delete(f"banks/{name}")

    # ---- JSON with a checksum

    def _write_json(self, path: str, value: dict[str, Any]) -> None:
        self.files.write(path, to_document(value))

    def _read_json(self, path: str) -> dict[str, Any] | None:
        content = self.files.read(path)
        return None if content is None else from_document(content)


def _parsed(content: bytes) -> Any:
    """Return a JSON document, or None if it is damaged."""
    try:
        return json.loads(content)
    except ValueError:
        return None
