"""Read the weights of teachers from files: safetensors, or what `torch.save` wrote."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pld_ray.errors import InputError

TORCH = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # endings of files that `torch.save` wrote
# Where training programs put the weights in their checkpoints, and what they put before the names.
ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "student", "ema")
DEPTH = 4  # entries inside entries
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")


def read_weights(path: str) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of a weights file by name. Code inside the file is never run.

    Args:
        path: A safetensors file, or a file that `torch.save` wrote (.pth, .pt, .bin, .ckpt, .tar):
            a state dict, or a checkpoint that holds one.

    Returns:
        The tensors, and what was unwrapped, for the user.

    Raises:
        InputError: The file cannot be read, or holds no weights.
    """
    try:
        if not path.lower().endswith(TORCH):
            return load_file(path), []
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many types
        raise InputError(
            f"teacher weights {path!r} cannot be read: {_reason(error, path)}"
        ) from None
    undone: list[str] = []
    while isinstance(content, Mapping) and not _is_state(content) and len(undone) < DEPTH:
        name = next((n for n in ENTRIES if isinstance(content.get(n), Mapping)), None)
        if name is None:
            break
        undone.append(f"entry {name!r}")
        content = content[name]
    if not isinstance(content, Mapping) or not _is_state(content):
        shown = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            other = [name for name, x in content.items() if not isinstance(x, Tensor)]
            shown = f"without tensors by name: {list(content)[:5]}"
            if content and len(other) < len(content):
                shown = f"not only tensors: {other[:5]} are none"
        raise InputError(
            f"teacher weights {path!r}: holds no state dict: its content is {shown}; expected "
            f"tensors by name, or a checkpoint with one of {', '.join(ENTRIES)}"
        )
    return dict(content), undone


def _reason(error: Exception, path: str) -> str:
    """Return why a weights file cannot be read, and what was expected."""
    if isinstance(error, FileNotFoundError):
        return f"{error}; on a cluster, every machine must see the file under this path"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "the file is empty"
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    if path.lower().endswith(TORCH):
        if isinstance(error, pickle.UnpicklingError):  # torch then advises to run code in the file
            said = "it holds more than tensors, or torch.save did not write it"
        return f"{said}; expected a state dict, as torch.save(model.state_dict(), path) writes it"
    return f"{said}; expected safetensors, or an ending of files of torch.save: {', '.join(TORCH)}"


def _is_state(content: Mapping[Any, Any]) -> bool:
    """Return whether a mapping holds tensors by name, and nothing else."""
    named = all(isinstance(name, str) for name in content)
    return bool(content) and named and all(isinstance(x, Tensor) for x in content.values())


def fit_weights(
    path: str, network: nn.Module, what: str, classes: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Read a weights file and fit its names to a network.

    Args:
        path: The path of the file.
        network: The network; it may be on the meta device.
        what: The name of the network, for error messages.
        classes: The number of classes of the data.

    Returns:
        A state dict for `network.load_state_dict`, and sentences for the user.

    Raises:
        InputError: The file cannot be read, its tensors do not fit, or they are not finite.
    """
    stored, undone = read_weights(path)
    wanted = network.state_dict()
    if not stored:
        raise InputError(f"teacher weights {path!r}: holds no tensors")
    while stored.keys().isdisjoint(wanted):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in stored)), None)
        if prefix is None:
            break
        undone.append(f"prefix {prefix!r}")
        stored = {name.removeprefix(prefix): x for name, x in stored.items()}
    for name, tensor in wanted.items():  # torch accepts this too: it only counts batches
        if name.endswith("num_batches_tracked") and name not in stored:
            stored[name] = torch.zeros_like(tensor, device="cpu")
    where = f"teacher weights {path!r}"
    for name in dict.fromkeys([*wanted, *stored]):
        want = tuple(wanted[name].shape) if name in wanted else None
        got = tuple(stored[name].shape) if name in stored else None
        if want != got:
            detail = f"tensor {name!r} has shape {got} in the file and {want} in the network"
            if got is None:
                detail = f"the file has no tensor {name!r}; it has {', '.join([*stored][:3])}, ..."
            elif want is None:
                detail = f"the network has no tensor {name!r}, which is in the file"
            elif want[1:] == got[1:] and want[0] == classes:
                detail += f"; the file seems to be for {got[0]} classes, but the data has {classes}"
            raise InputError(f"{where} do not fit {what!r}: {detail}{_written_for(path, what)}")
        if fault := _fault(stored[name], wanted[name].dtype):
            raise InputError(f"{where}: tensor {name!r} {fault}")
    notes = [f"{where}: undone: {', '.join(undone)}"] if undone else []
    return stored, notes


def _written_for(path: str, what: str) -> str:
    """Return which other network the config.json of timm beside a file names, or ""."""
    try:
        known = json.loads(Path(path).with_name("config.json").read_text(encoding="utf-8"))
        name, args = known["architecture"], dict(known.get("model_args") or {})
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    args.pop("in_chans", None)  # that of the data
    entry = f"name: {name}" + (f", args: {json.dumps(args)}" if args else "")
    return f"; the config.json beside it is for {{{entry}}}" if name != what or args else ""


def _fault(tensor: Tensor, wanted: torch.dtype) -> str:
    """Return what is wrong with a stored tensor whose network has another type, or ""."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    if not dense or tensor.is_complex() or tensor.is_floating_point() != wanted.is_floating_point:
        kind = tensor.dtype if dense else f"{tensor.dtype}, {tensor.layout}"
        return (
            f"has the type {kind}, and the network {wanted}: expected a dense tensor of this kind"
        )
    if tensor.is_meta:
        return "has no values: it was saved from the meta device"
    return "" if torch.isfinite(tensor.to(wanted)).all() else "is not finite"
