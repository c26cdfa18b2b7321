"""Where finished and unfinished work lies. Only this file knows the layout:

    ROOT/trials/ID/trial.json           the spec, written when the trial starts
                   epochs.jsonl         one line of metrics an epoch
                   checkpoint.pt        everything needed to go on after one of them
                   student.safetensors  the trained weights
                   record.json          written last: it exists only if the trial has finished
                   failure.json         why the last attempt failed, if it did
                   landscape.json       the loss around the trained weights, if it was asked for
    ROOT/banks/KEY/bank.json            whose logits, on which images
                   VIEW/CHUNK.KIND      some of them (bank.py)

Every file is written whole and then put in place, so that none is ever seen half-written.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from pyarrow import fs

from pld_ray.errors import InputError
from pld_ray.spec import Trial

if TYPE_CHECKING:
    from torch import Tensor


class Store:
    """Trial folders under a local path or any URI that pyarrow.fs opens (s3://, gs://, hdfs://)."""

    def __init__(self, root: str | Path) -> None:
        text = str(root)
        try:
            if "://" in text:
                self.fs, self.root = fs.FileSystem.from_uri(text)
                self.uri = text
            else:
                self.fs, self.root = fs.LocalFileSystem(), str(Path(text).expanduser().resolve())
                self.uri = self.root
        except (ValueError, OSError) as error:
            raise InputError(f"storage {text!r}: expected a folder or a URI: {error}") from None
        self.local = isinstance(self.fs, fs.LocalFileSystem)

    # ---- what a trial writes

    def start(self, trial: Trial) -> None:
        """Write the spec, before anything else of the trial."""
        self._write(f"trials/{trial.id}/trial.json", _json(trial.model_dump(mode="json")))

    def checkpoint(self, trial: Trial, state: dict[str, Any]) -> None:
        """Keep all that is needed to go on."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._write(f"trials/{trial.id}/checkpoint.pt", buffer.getvalue())

    def log(self, trial: Trial, history: list[dict[str, Any]]) -> None:
        """Keep the metrics of every epoch so far."""
        lines = "".join(json.dumps(epoch) + "\n" for epoch in history)
        self._write(f"trials/{trial.id}/epochs.jsonl", lines.encode())

    def finish(self, trial: Trial, record: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """The student's weights, then the record; the checkpoint is not needed any more."""
        from safetensors.torch import save

        contiguous = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
        content = save(contiguous)
        self._write(f"trials/{trial.id}/student.safetensors", content)
        digest = hashlib.sha256(content).hexdigest()
        self._write(f"trials/{trial.id}/record.json", _json(record | {"weights_sha256": digest}))
        for name in ("checkpoint.pt", "failure.json"):
            self._delete(f"trials/{trial.id}/{name}")

    def fail(self, trial: Trial, reason: str, traceback: str = "") -> None:
        """Say why an attempt failed; the checkpoint stays."""
        failure = {"reason": reason, "traceback": traceback.splitlines()}
        self._write(f"trials/{trial.id}/failure.json", _json(failure))

    def keep_landscape(self, trial: Trial, found: dict[str, Any]) -> None:
        """Keep the loss around the trained weights (analysis.weight_space)."""
        self._write(f"trials/{trial.id}/landscape.json", _json(found))

    def forget_failure(self, trial: Trial) -> None:
        """A new attempt begins."""
        self._delete(f"trials/{trial.id}/failure.json")

    # ---- what others read

    def record(self, trial_id: str) -> dict[str, Any] | None:
        """The record of a finished trial, or None."""
        return self._read_json(f"trials/{trial_id}/record.json")

    def failure(self, trial_id: str) -> dict[str, Any] | None:
        """reason and traceback of the last attempt if it failed."""
        return self._read_json(f"trials/{trial_id}/failure.json")

    def landscape(self, trial_id: str) -> dict[str, Any] | None:
        """What `keep_landscape` kept, or None."""
        return self._read_json(f"trials/{trial_id}/landscape.json")

    def epochs(self, trial_id: str) -> list[dict[str, Any]]:
        """The metrics of every epoch so far."""
        content = self._read(f"trials/{trial_id}/epochs.jsonl")
        return [json.loads(line) for line in content.splitlines()] if content else []

    def finished(self) -> set[str]:
        """Ids of the trials that have a record."""
        names = [file.path.split("/")[-2:] for file in self._list("trials")]
        return {folder for folder, name in names if name == "record.json"}

    def load_checkpoint(self, trial: Trial) -> dict[str, Any] | None:
        """The state last kept by `checkpoint`, or None: also where the file is damaged."""
        import torch

        content = self._read(f"trials/{trial.id}/checkpoint.pt")
        if content is None:
            return None
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception:  # a damaged zip raises any of a dozen types; the trial starts anew
            return None

    def load_weights(self, trial: Trial) -> dict[str, Tensor]:
        """The trained weights of a finished trial; InputError if they are missing or damaged."""
        from safetensors.torch import load

        content = self._weights(trial)
        if hashlib.sha256(content).hexdigest() != self.weights_digest(trial):
            raise InputError(
                f"{self.folder(trial.id)}/student.safetensors: not what its record says (damaged); "
                "delete the folder to train it again"
            )
        return load(content)

    def weights_digest(self, trial: Trial) -> str:
        """The sha256 of a finished trial's weights, as its record has it."""
        known = (self.record(trial.id) or {}).get("weights_sha256")
        return known or hashlib.sha256(self._weights(trial)).hexdigest()

    def _weights(self, trial: Trial) -> bytes:
        content = self._read(f"trials/{trial.id}/student.safetensors")
        if content is None:
            raise InputError(f"trial {trial.id} ({trial.label}) has no weights in {self.uri}")
        return content

    def folder(self, trial_id: str) -> str:
        """Where the trial lies, for messages."""
        return f"{self.root}/trials/{trial_id}"

    # ---- the teacher bank

    def start_bank(self, key: str, about: dict[str, Any]) -> None:
        """Say what a bank holds, before anything else of it."""
        if self.bank(key) is None:
            self._write(f"banks/{key}/bank.json", _json(about))

    def bank(self, key: str) -> dict[str, Any] | None:
        """What a bank holds, or None if there is none."""
        return self._read_json(f"banks/{key}/bank.json")

    def banks(self) -> dict[str, dict[str, int]]:
        """Of each bank, by key, its files VIEW/CHUNK.KIND and their bytes."""
        found: dict[str, dict[str, int]] = {}
        for file in self._list("banks"):
            key, _, name = file.path.removeprefix(f"{self.root}/banks/").partition("/")
            if not file.base_name.startswith("."):  # of a process that died while writing
                found.setdefault(key, {})[name] = file.size or 0
        return found

    def drop_bank(self, key: str) -> None:
        """Delete a bank; a trial that is using it computes again what it still needs."""
        self.fs.delete_dir(f"{self.root}/banks/{key}")

    def write_chunk(self, name: str, content: bytes) -> None:
        """Keep a chunk of a bank; `name` is KEY/VIEW/CHUNK.KIND."""
        self._write(f"banks/{name}", content)

    def read_chunk(self, name: str) -> npt.NDArray[np.uint8] | None:
        """The bytes of a chunk, or None; a local file is mapped, not read."""
        if not self.local:
            content = self._read(f"banks/{name}")
            return None if content is None else np.frombuffer(content, np.uint8)
        try:
            return np.memmap(f"{self.root}/banks/{name}", np.uint8, "r")
        except FileNotFoundError:
            return None
        except ValueError:  # an empty file cannot be mapped
            return np.zeros(0, np.uint8)

    def missing_chunks(self, names: list[str]) -> list[str]:
        """Those that are not in the store, in their order."""
        found = self.fs.get_file_info([f"{self.root}/banks/{name}" for name in names])
        return [n for n, f in zip(names, found, strict=True) if f.type == fs.FileType.NotFound]

    def drop_chunk(self, name: str) -> None:
        """Delete a chunk, because it is damaged."""
        self._delete(f"banks/{name}")

    def free_bytes(self) -> int | None:
        """The room left on the disk of a local store."""
        if not self.local:
            return None
        folder = next(p for p in (Path(self.root), *Path(self.root).parents) if p.is_dir())
        return shutil.disk_usage(folder).free

    # ---- files

    def _list(self, folder: str) -> list[fs.FileInfo]:
        selector = fs.FileSelector(f"{self.root}/{folder}", allow_not_found=True, recursive=True)
        try:
            return [f for f in self.fs.get_file_info(selector) if f.type == fs.FileType.File]
        except OSError as error:
            raise InputError(f"storage {self.uri!r} cannot be read: {error}") from None

    def _write(self, path: str, content: bytes) -> None:
        folder, _, name = f"{self.root}/{path}".rpartition("/")
        if not self.local:  # an object appears whole or not at all
            with self.fs.open_output_stream(f"{folder}/{name}") as file:
                file.write(content)
            return
        self.fs.create_dir(folder, recursive=True)
        part = f"{folder}/.{name}.{uuid4().hex[:8]}"
        try:
            with self.fs.open_output_stream(part) as file:
                file.write(content)
            self.fs.move(part, f"{folder}/{name}")
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

    def _read(self, path: str) -> bytes | None:
        try:
            with self.fs.open_input_stream(f"{self.root}/{path}") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _read_json(self, path: str) -> Any:
        content = self._read(path)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            raise InputError(
                f"{self.root}/{path}: not valid JSON; delete it to run again"
            ) from None

    def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.root}/{path}")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
