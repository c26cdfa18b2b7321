"""A trained student for others: the folder that timm loads, or ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pld_ray import data
from pld_ray.errors import InputError
from pld_ray.models import create_model
from pld_ray.spec import Trial
from pld_ray.store import Store


def load(trial: Trial, store: Store) -> tuple[nn.Module, data.Images]:
    """A finished trial's student in evaluation mode, and its dataset."""
    images = data.load(trial.data)
    model = create_model(trial.student, *images.shape)
    model.load_state_dict(store.load_weights(trial))
    return model.eval(), images


def write(trial: Trial, store: Store, folder: Path, onnx: bool = False) -> list[Path]:
    """Write config.json and model.safetensors, or model.onnx; returns the paths.

    The folder is for `timm.create_model("local-dir:FOLDER", pretrained=True)`, after
    `import pld_ray.models` where the network is one of ours. Images come in as [B, channels, H, W],
    normalised by mean and std of config.json's pretrained_cfg.
    """
    model, images = load(trial, store)
    classes, channels, size = images.shape
    folder.mkdir(parents=True, exist_ok=True)
    cfg: dict[str, Any] = {
        "input_size": [channels, size, size],
        "num_classes": classes,
        "mean": list(images.mean),
        "std": list(images.std),
        "interpolation": "bicubic",
        "crop_pct": trial.data.crop_pct,
    }
    known = getattr(model, "pretrained_cfg", None) or {}
    cfg |= {name: known[name] for name in ("classifier", "first_conv") if known.get(name)}
    args = {"in_chans": channels, **trial.student.args}
    if known.get("fixed_input_size"):
        cfg["fixed_input_size"] = True
        args.setdefault("img_size", size)
    config = {
        "architecture": trial.student.name,
        "num_classes": classes,
        "num_features": model.num_features,
        "model_args": args,
        "pretrained_cfg": cfg,
        "pld_ray": {"trial": trial.id, **trial.model_dump(mode="json", exclude_defaults=True)},
    }
    paths = [folder / "config.json"]
    paths[0].write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if onnx:
        paths.append(folder / "model.onnx")
        _write_onnx(model, torch.zeros(2, channels, size, size), paths[1])
    else:
        from safetensors.torch import save_file

        paths.append(folder / "model.safetensors")
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, paths[1], metadata={"format": "pt"})
    return paths


def _write_onnx(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Logits [B, C] of images [B, channels, H, W]; B is free."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("--onnx needs another package: pip install 'pld-ray[onnx]'") from None
    torch.onnx.export(
        model,
        (example,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
