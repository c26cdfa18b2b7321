"""Where finished and unfinished work lies: one folder a trial. Only this file knows its layout.

    ROOT/trials/ID/trial.json           the spec, written when the trial starts
                   epochs.jsonl         one line of metrics an epoch
                   checkpoint.pt        everything needed to go on after that epoch
                   student.safetensors  the trained weights
                   record.json          written last: it exists only if the trial has finished
                   failure.json         why the last attempt failed, if it did

Every file is written whole and then put in place, so that none is ever seen half-written.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

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
        self._write(trial.id, "trial.json", _json(trial.model_dump(mode="json")))

    def checkpoint(self, trial: Trial, state: dict[str, Any]) -> None:
        """Keep all that is needed to go on; `state["history"]` is the list of epoch metrics."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._write(trial.id, "checkpoint.pt", buffer.getvalue())
        lines = "".join(json.dumps(epoch) + "\n" for epoch in state["history"])
        self._write(trial.id, "epochs.jsonl", lines.encode())

    def finish(self, trial: Trial, record: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """The student's weights, then the record; the checkpoint is not needed any more."""
        from safetensors.torch import save

        contiguous = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
        self._write(trial.id, "student.safetensors", save(contiguous))
        self._write(trial.id, "record.json", _json(record))
        for name in ("checkpoint.pt", "failure.json"):
            self._delete(trial.id, name)

    def fail(self, trial: Trial, reason: str, traceback: str = "") -> None:
        """Say why an attempt failed; the checkpoint stays."""
        self._write(
            trial.id, "failure.json", _json({"reason": reason, "traceback": traceback.splitlines()})
        )

    def forget_failure(self, trial: Trial) -> None:
        """A new attempt begins."""
        self._delete(trial.id, "failure.json")

    # ---- what others read

    def record(self, trial_id: str) -> dict[str, Any] | None:
        """The record of a finished trial, or None."""
        return self._read_json(trial_id, "record.json")

    def failure(self, trial_id: str) -> dict[str, Any] | None:
        """reason and traceback of the last attempt if it failed."""
        return self._read_json(trial_id, "failure.json")

    def epochs(self, trial_id: str) -> list[dict[str, Any]]:
        """The metrics of every epoch so far."""
        content = self._read(trial_id, "epochs.jsonl")
        return [json.loads(line) for line in content.splitlines()] if content else []

    def finished(self) -> set[str]:
        """Ids of the trials that have a record."""
        selector = fs.FileSelector(f"{self.root}/trials", allow_not_found=True, recursive=True)
        try:
            files = self.fs.get_file_info(selector)
        except OSError as error:
            raise InputError(f"storage {self.uri!r} cannot be read: {error}") from None
        return {f.path.split("/")[-2] for f in files if f.base_name == "record.json"}

    def load_checkpoint(self, trial: Trial) -> dict[str, Any] | None:
        """The state last kept by `checkpoint`, or None: also where the file is damaged."""
        import torch

        content = self._read(trial.id, "checkpoint.pt")
        if content is None:
            return None
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception:  # a damaged zip raises any of a dozen types; the trial starts anew
            return None

    def load_weights(self, trial: Trial) -> dict[str, Tensor]:
        """The trained weights of a finished trial."""
        from safetensors.torch import load

        content = self._read(trial.id, "student.safetensors")
        if content is None:
            raise InputError(f"trial {trial.id} ({trial.label}) has no weights in {self.uri}")
        return load(content)

    def folder(self, trial_id: str) -> str:
        """Where the trial lies, for messages."""
        return f"{self.root}/trials/{trial_id}"

    # ---- files

    def _write(self, trial_id: str, name: str, content: bytes) -> None:
        folder = f"{self.root}/trials/{trial_id}"
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

    def _read(self, trial_id: str, name: str) -> bytes | None:
        try:
            with self.fs.open_input_stream(f"{self.root}/trials/{trial_id}/{name}") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _read_json(self, trial_id: str, name: str) -> Any:
        content = self._read(trial_id, name)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            raise InputError(
                f"{self.root}/trials/{trial_id}/{name}: not valid JSON; delete it to run again"
            ) from None

    def _delete(self, trial_id: str, name: str) -> None:
        path = f"{self.root}/trials/{trial_id}/{name}"
        if self.fs.get_file_info(path).type != fs.FileType.NotFound:
            self.fs.delete_file(path)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
