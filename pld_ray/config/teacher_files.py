"""What a plan must know of a teacher's weights file: its hash, and how images were normalised."""

from __future__ import annotations

import hashlib
import json
import stat
from functools import cache
from pathlib import Path
from typing import Any

from pld_ray.errors import InputError


def teacher_file(path: str, where: str) -> dict[str, Any]:
    """Return what identifies the weights of a teacher.

    Args:
        path: The path of a weights file, or of a folder with model.safetensors, as
            `pld-ray student` and timm write it.
        where: The field, for error messages.

    Returns:
        The fields of `Weights`: weights (the path of the file), sha256, and mean and std if a
        config.json beside the file has them.

    Raises:
        InputError: The file cannot be read, or config.json is broken.
    """
    file = Path(path)
    try:
        if file.is_dir():
            file /= "model.safetensors"
        state = file.stat()
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("not a file")
        digest = _digest(str(file), state.st_mtime_ns, state.st_size)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f'{where} is {str(file)!r}: expected "train", "pretrained" or a weights file, such as '
            f"model.safetensors or model.pth ({reason})"
        ) from None
    return {"weights": str(file), "sha256": digest, **_statistics(file.with_name("config.json"))}


@cache
def _digest(path: str, mtime: int, size: int) -> str:
    """Return the SHA-256 of a file; cached until its modification time or size changes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _statistics(config: Path) -> dict[str, tuple[float, ...]]:
    """Return mean and std of the `pretrained_cfg` in timm's config.json, if it has them."""
    if not config.is_file():
        return {}
    try:
        known = json.loads(config.read_text(encoding="utf-8")).get("pretrained_cfg") or {}
        return {name: tuple(map(float, known[name])) for name in ("mean", "std") if name in known}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{config}: expected the config.json of a timm model: {error}") from None
