"""What a trial is: one training run, fully specified, known by the hash of what it says.

A teacher that has to be trained is itself a Trial inside the student's. Nothing here imports torch
or Ray. How a YAML file becomes trials stands in experiment.py.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pld_ray.config.validation import Part, sentence
from pld_ray.errors import nearest
from pld_ray.losses import REGISTRY, LossParams


class Model(Part):
    """A network by its timm name, with further arguments for `timm.create_model`."""

    name: str
    args: dict[str, Any] = {}


IN_MEMORY = ("digits", "cifar10", "cifar100")  # datasets that come as arrays


class Data(Part):
    """A dataset by name and the augmentation of its training images.

    name: digits, cifar10, cifar100, imagenet, folder:PATH or parquet:PATH. root: where an existing
    copy of cifar, or imagenet, lies. image_size: resize (shorter side) and centre-crop to this many
    pixels. pad: zero padding before a random crop, in pixels. random_resized_crop: train on random
    parts of the images, resized to image_size; they then stay encoded until a batch needs them, and
    the centre of a validation image is crop_pct of its shorter side. mean, std: per channel, in
    [0, 1]; default: measured on the training images. holdout: validate on the last so many training
    images instead, and do not train on them. limit: keep the first so many of those that are left.
    """

    name: str
    root: str | None = None
    image_size: int | None = Field(None, ge=1)
    pad: int = Field(0, ge=0)
    flip: bool = False
    random_resized_crop: bool = False
    crop_pct: float = Field(1.0, gt=0, le=1)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    holdout: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _no_mixing(cls, value: Any) -> Any:
        for field in ("mixup", "cutmix"):
            if isinstance(value, dict) and field in value:
                raise ValueError(
                    f"{field}: augmentation that mixes samples is not supported: a ranking begins "
                    "with the one true label, and teacher logits are kept for each image; "
                    "pad and flip are"
                )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.random_resized_crop:
            if self.image_size is None:
                raise ValueError("random_resized_crop needs image_size: the side to resize to")
            if self.name in IN_MEMORY:
                raise ValueError(
                    f"random_resized_crop: {self.name} has small images; pad and flip are for them"
                )
            if self.pad:
                raise ValueError("pad: not together with random_resized_crop")
        elif self.crop_pct != 1:
            raise ValueError("crop_pct: goes with random_resized_crop")
        return self

    @property
    def augmented(self) -> bool:
        """Whether an image looks different from epoch to epoch."""
        return self.pad > 0 or self.flip or self.random_resized_crop


class Optimizer(Part):
    """timm's optimizer factory: any name it knows, and further arguments for it."""

    name: str = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    betas: tuple[float, ...] | None = None
    args: dict[str, Any] = {}


class Schedule(Part):
    """timm's scheduler factory, stepped every update."""

    name: Literal["cosine", "multistep", "step", "poly", "constant"] = "cosine"
    warmup_epochs: float = Field(0, ge=0)
    warmup_lr: float = Field(0.0, ge=0)
    min_lr: float = Field(0.0, ge=0)
    decay_rate: float = Field(0.1, gt=0, le=1)
    milestones: tuple[int, ...] = ()  # multistep: epochs
    decay_epochs: float = Field(30, gt=0)  # step: every so many epochs


class Weights(Part):
    """A teacher that is not trained here: timm's pretrained weights or a safetensors file."""

    name: str
    args: dict[str, Any] = {}
    weights: str  # "pretrained" or the path of a safetensors file
    sha256: str | None = None  # of that file: the teacher's identity, wherever it lies


class Resources(Part):
    """What trials take of the cluster; none of it changes a result.

    gpus_per_worker: by default one where the cluster has any; fractions share one. concurrent: so
    many trials at once, also where they do not fit yet, for clusters that grow when asked;
    default: as many as fit. patience: seconds without a step after which a worker hangs.
    """

    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float | None = Field(None, ge=0)
    concurrent: int | None = Field(None, ge=1)
    patience: float = Field(1800, gt=0)

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_gpus(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            said = "expected a whole number of GPUs, or a part of one"
            raise PydanticCustomError("gpus", said)
        return gpus


def _loss(value: Any) -> LossParams:
    """The settings of a loss, by its name in the registry; the string x means {name: x}."""
    if isinstance(value, LossParams):
        return value
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or "name" not in value:
        said = "expected a name, or a mapping with a name"
        raise PydanticCustomError("loss", " is {value}: " + said, {"value": repr(value)})
    if value["name"] not in REGISTRY:
        hint = nearest(str(value["name"]), REGISTRY)
        said = f": unknown loss {value['name']!r}; {hint}"
        raise PydanticCustomError("loss", "{said}", {"said": said})
    model = REGISTRY[value["name"]]
    try:
        return model.model_validate(value)
    except ValidationError as error:
        said = f".{sentence(error, model)}"
        raise PydanticCustomError("loss", "{said}", {"said": said}) from None


Loss = Annotated[SerializeAsAny[LossParams], PlainValidator(_loss)]


class Trial(Part):
    """One training run, fully specified."""

    data: Data
    student: Model
    teacher: Trial | Weights | None = None
    # how they are kept in the bank; "live": the teacher's forward pass in every step instead
    teacher_logits: Literal["float16", "float32", "live"] = "float16"
    views: int | None = Field(None, ge=1)  # epoch e sees images and teacher as in epoch e mod views
    loss: Loss
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    epochs: int = Field(ge=1)
    batch_size: int = Field(128, ge=1)  # global: each of the workers takes its share
    drop_last: bool = False
    clip_grad: float | None = Field(None, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA
    channels_last: bool = True
    compile: bool = False
    workers: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _consistent(self) -> Trial:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared by {self.workers} workers: "
                "it must be a multiple of workers"
            )
        if self.loss.needs_teacher and self.teacher is None:
            raise ValueError(f"loss {self.loss.name} needs a teacher: set the field teacher")
        return self

    def view(self, epoch: int) -> int:
        """Which augmentation of the images an epoch sees: 0 if there is but one."""
        if not self.data.augmented:
            return 0
        return epoch % self.views if self.views else epoch

    @cached_property
    def id(self) -> str:
        """16 hex digits: the hash of the canonical spec."""
        text = json.dumps(canonical(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def teacher_name(self) -> str | None:
        """The name of the teacher's network."""
        teacher = self.teacher.student if isinstance(self.teacher, Trial) else self.teacher
        return teacher.name if teacher else None

    def model_copy(self, **kwargs: Any) -> Trial:
        """As pydantic's; the copy has an id of its own."""
        copied = super().model_copy(**kwargs)
        copied.__dict__.pop("id", None)
        return copied

    @property
    def flat(self) -> dict[str, Any]:
        """Its settings by dotted field, but for student, teacher, loss and seed."""
        dump = self.model_dump(mode="json", exclude={"teacher", "loss", "seed"})
        dump["student"].pop("name")
        if self.teacher is None or self.loss.needs_features:  # no logits to be kept
            dump.pop("teacher_logits")
        flat: dict[str, Any] = {}
        for field, value in dump.items():
            if isinstance(value, dict):
                flat |= {f"{field}.{name}": part for name, part in value.items()}
            else:
                flat[field] = value
        return flat

    @property
    def label(self) -> str:
        """A short name for people; not unique."""
        parameters = self.loss.model_dump(exclude={"name"}, exclude_defaults=True)
        said = "".join(f" {name} {_short(value)}" for name, value in parameters.items())
        return f"{self.loss.name}{said} {self.student.name} seed {self.seed}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


NOT_IDENTITY = {"root", "compile"}  # where things lie and how fast they run changes no result


def canonical(trial: Trial) -> dict[str, Any]:
    """The spec without defaults (so that new fields keep old ids) and with one form per number."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in NOT_IDENTITY}
        if isinstance(value, list):
            return [clean(v) for v in value]
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return value

    dump = trial.model_dump(mode="json", exclude_defaults=True)
    if isinstance(trial.teacher, Weights) and trial.teacher.sha256:
        dump["teacher"].pop("weights")  # the file's content is the identity, not its path
    return {"format": 1, **clean(dump)}
