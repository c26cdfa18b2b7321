"""Trained networks for other programs: the folder that timm loads, safetensors, or ONNX."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load
from safetensors.torch import save as to_safetensors
from torch import nn

from pld_ray.config.trial import Trial
from pld_ray.errors import InputError
from pld_ray.models.factory import create_student, student_model
from pld_ray.store.files import Files
from pld_ray.store.store import Store


def save(
    network: nn.Module,
    path: str | Path,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    **args: Any,
) -> list[Path]:
    """Write a trained network to a folder that timm loads, or to one safetensors file.

    Args:
        network: For a folder, a network made by `timm.create_model`.
        path: A folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`, with
            model.safetensors and config.json; or a file that ends in .safetensors, for the weights
            alone. Networks of this package need `import pld_ray.models` before they are loaded.
        mean: Mean of each channel of the training images, in [0, 1], for config.json.
        std: Their standard deviation.
        args: Arguments that were given to `timm.create_model` and change the network.
            `num_classes` and `in_chans` are found without them.

    Returns:
        The paths of the files.

    Raises:
        InputError: timm cannot make the network again from its name and these arguments, or the
            network that it makes gives other logits.
    """
    path = Path(path)
    state = {name: x.detach().cpu().contiguous() for name, x in network.state_dict().items()}
    if path.suffix == ".safetensors":
        return _write(path.parent, {path.name: to_safetensors(state)})
    known = getattr(network, "pretrained_cfg", None)
    if not known or not known.get("architecture"):
        raise InputError(
            f"save: timm did not make this {type(network).__name__}: expected a path that ends in "
            ".safetensors, for the weights alone"
        )
    convolution = next((p for p in network.parameters() if p.ndim == 4), None)
    if convolution is not None:
        args = {"in_chans": convolution.shape[1], **args}
    args = {**getattr(network, "model_args", {}), **args}
    classes: Any = network.num_classes
    _check_shapes(known["architecture"], {"num_classes": classes, **args}, state)
    _, height, width = known.get("input_size") or (3, 224, 224)
    size = args.get("img_size") or (height, width)
    size = (size, size) if isinstance(size, int) else tuple(size)
    _check_logits(network, known, {"num_classes": classes, **args}, state, size)
    images = {"mean": mean, "std": std}
    config = _config(network, known["architecture"], classes, args, size)
    config["pretrained_cfg"] |= {name: list(x) for name, x in images.items() if x is not None}
    return _write(path, {"model.safetensors": to_safetensors(state), "config.json": _json(config)})


def load_student(trial: Trial, store: Store) -> nn.Module:
    """Return the student of a finished trial with its weights, in evaluation mode.

    It takes images [B, channels, H, W], normalised by the mean and std of the trial's record, to
    logits [B, C].

    Raises:
        InputError: The trial has not finished.
    """
    weights = store.weights(trial)
    record = store.record(trial.id)
    assert record is not None  # else it has no weights
    data = record["data"]
    network = create_student(trial, len(data["class_names"]), data["channels"], data["image_size"])
    network.load_state_dict(load(weights))
    return network.eval()


def export_student(trial: Trial, store: Store, folder: Path, onnx: bool = False) -> list[Path]:
    """Write the student of a finished trial: the folder that timm loads, or ONNX.

    Both take images [B, channels, H, W], normalised by mean and std of config.json's
    pretrained_cfg, to logits [B, C].

    Args:
        trial: A finished trial.
        store: Holds its weights.
        folder: Receives model.safetensors (with `onnx` model.onnx) and config.json.
        onnx: Whether to write ONNX instead. The number of images B is free.

    Returns:
        The paths of the files.

    Raises:
        InputError: The trial has not finished, or a package for ONNX is missing.
    """
    network = load_student(trial, store)
    record = store.record(trial.id)
    assert record is not None  # else it has no weights
    data = record["data"]
    classes, channels, size = len(data["class_names"]), data["channels"], data["image_size"]
    if onnx:
        files = {"model.onnx": _onnx(network, channels, size)}
    else:
        files = {"model.safetensors": store.weights(trial)}
    model = student_model(trial, classes, channels, size)
    args = {"in_chans": channels, **model.args}
    known: Any = network.pretrained_cfg
    if known.get("fixed_input_size"):
        args.setdefault("img_size", size)
    name = model.name.split(".")[0]  # without timm's tag, which names other weights
    config = _config(network, name, classes, args, (size, size))
    shown = {"mean": data["mean"], "std": data["std"], "crop_pct": trial.data.crop_pct}
    config["pretrained_cfg"] |= shown | {"interpolation": "bicubic"}
    config["label_names"] = data["class_names"]
    spec = trial.model_dump(mode="json", exclude_defaults=True)
    return _write(
        folder, files | {"config.json": _json(config | {"pld_ray": {"trial": trial.id, **spec}})}
    )


def _write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    for name, content in files.items():
        Files(folder).write(name, content)
    return [folder / name for name in files]


def _json(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=1) + "\n").encode()


def _config(
    network: nn.Module, architecture: str, classes: int, args: dict[str, Any], size: tuple[int, ...]
) -> dict[str, Any]:
    """The config.json of a network, as timm writes it for a model hub."""
    known: Any = network.pretrained_cfg
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": network.num_features,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [args.get("in_chans", 3), *size],
            "fixed_input_size": bool(known.get("fixed_input_size")),
            "num_classes": classes,
            "classifier": known.get("classifier"),
        },
    }


def _check_shapes(architecture: str, args: dict[str, Any], state: dict[str, Any]) -> None:
    """InputError unless timm makes a network of the same shapes from these arguments."""
    try:
        with torch.device("meta"):
            again = timm.create_model(architecture, **args).state_dict()
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"save: timm cannot make {architecture!r} with {args}: {error}") from None
    for name in dict.fromkeys([*state, *again]):
        want, got = (tuple(s[name].shape) if name in s else None for s in (state, again))
        if want != got:
            raise InputError(
                f"save: timm makes another network from {architecture!r} with {args}: tensor "
                f"{name!r} has shape {want} in this network and {got} in timm's; pass the other "
                "arguments that were given to timm.create_model, such as "
                "save(student, folder, img_size=32)"
            )


@torch.no_grad()
def _check_logits(
    network: nn.Module, known: Any, args: dict[str, Any], state: dict[str, Any], size: Any
) -> None:
    """InputError unless the network that timm makes gives the same logits, on random images."""
    again = timm.create_model(known["architecture"], **args)
    again.load_state_dict(state)
    ours = copy.deepcopy(network).cpu()
    fixed = known.get("fixed_input_size")
    images = torch.randn(2, args.get("in_chans", 3), *(size if fixed else (64, 64)))
    expected, got = (each.float().eval()(images) for each in (ours, again))
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise InputError(
            f"save: the network that timm makes from {known['architecture']!r} with {args} gives "
            "other logits; pass the other arguments that were given to timm.create_model, such as "
            "save(student, folder, global_pool='max'), or save the weights to a .safetensors file"
        )


def _onnx(model: nn.Module, channels: int, size: int) -> bytes:
    """The network in ONNX, the number of images B free."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("--onnx needs another package: pip install 'pld-ray[onnx]'") from None
    with warnings.catch_warnings(action="ignore"):  # torch's of its own deprecations
        program = torch.onnx.export(
            model,
            (torch.zeros(2, channels, size, size),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()
