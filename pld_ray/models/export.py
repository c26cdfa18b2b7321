"""A trained student for others: the folder that timm loads, or ONNX."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import nn

from pld_ray.config.trial import Trial
from pld_ray.data import datasets, images
from pld_ray.errors import InputError
from pld_ray.models.factory import create_model
from pld_ray.store.files import Files
from pld_ray.store.store import Store


def student(trial: Trial, weights: bytes) -> tuple[nn.Module, images.Images]:
    """A finished trial's student in evaluation mode, and its dataset."""
    images = datasets.load(trial.data)
    model = create_model(trial.student, *images.shape)
    model.load_state_dict(load(weights))
    return model.eval(), images


def write(trial: Trial, store: Store, folder: Path, onnx: bool = False) -> list[Path]:
    """Write model.safetensors (with onnx: model.onnx) and config.json; returns the paths.

    The folder is for `timm.create_model("local-dir:FOLDER", pretrained=True)`, after
    `import pld_ray.models` where the network is one of ours. Both take images
    [B, channels, H, W], normalised by mean and std of config.json's pretrained_cfg, to logits
    [B, C]. Raises InputError for a trial that has not finished, and without the package for ONNX.
    """
    weights = store.weights(trial)
    model, images = student(trial, weights)
    files = {"model.onnx": _onnx(model, images)} if onnx else {"model.safetensors": weights}
    files["config.json"] = (json.dumps(_config(trial, model, images), indent=1) + "\n").encode()
    for name, content in files.items():
        Files(folder).write(name, content)
    return [folder / name for name in files]


def _config(trial: Trial, model: nn.Module, images: images.Images) -> dict[str, Any]:
    """As timm writes it for a model hub, and the trial's spec."""
    classes, channels, size = images.shape
    known: Any = model.pretrained_cfg
    args = {"in_chans": channels, **trial.student.args}
    if known.get("fixed_input_size"):
        args.setdefault("img_size", size)
    config: dict[str, Any] = {
        "input_size": [channels, size, size],
        "fixed_input_size": bool(known.get("fixed_input_size")),
        "num_classes": classes,
        "classifier": known.get("classifier"),
        "mean": list(images.mean),
        "std": list(images.std),
        "interpolation": "bicubic",
        "crop_pct": trial.data.crop_pct,
    }
    return {
        "architecture": trial.student.name.split(".")[0],  # no tag: these are other weights
        "num_classes": classes,
        "num_features": model.num_features,
        "model_args": args,
        "pretrained_cfg": config,
        "pld_ray": {"trial": trial.id, **trial.model_dump(mode="json", exclude_defaults=True)},
    }


def _onnx(model: nn.Module, images: images.Images) -> bytes:
    """The network in ONNX, the number of images B free."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("--onnx needs another package: pip install 'pld-ray[onnx]'") from None
    _, channels, size = images.shape
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
