"""The parts of a trial: networks, data, optimizer, schedule, existing weights, and resources."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pld_ray.config.registry import BUILT_IN_SCHEDULES, OPTIMIZERS, SCHEDULES
from pld_ray.config.validation import Part
from pld_ray.errors import nearest
from pld_ray.losses.parameters import Transform


class Model(Part):
    """A network.

    Attributes:
        name: The name of the network in timm.
        args: Further arguments for `timm.create_model`.
    """

    name: str
    args: dict[str, Any] = {}


Augment = Literal["own", Transform]
AUGMENTS: tuple[str, ...] = get_args(Augment)
# fields of data that change no stored image, only what training makes of it
ON_THE_FLY = ("pad", "flip", "augment", "mixup", "cutmix")
WHERE = ("name", "columns", "split", "config")  # fields that say where data is, not what it holds


class Columns(Part):
    """The columns of a dataset that holds images and labels in a table.

    Attributes:
        image: The column of the images: image files, as bytes or as a mapping with bytes and path.
        label: The column of the labels: class indices, or words.
    """

    image: str = "image"
    label: str = "label"


class Splits(Part):
    """The splits of a Hugging Face dataset by their names. A part is, for example, "train[:90%]".

    Attributes:
        train: The split to train on.
        val: The split to validate on; by default "validation", or "test" if there is no other.
    """

    train: str = Field("train", min_length=1)
    val: str | None = Field(None, min_length=1)


class Data(Part):
    """A dataset and the augmentation of its training images.

    Attributes:
        name: "digits", "cifar10", "cifar100", "imagenet", "folder:PATH", "parquet:PATH", or
            "hf:NAME" for a dataset of the Hugging Face hub or a local folder in one of its layouts.
        columns: The columns of images and labels ("hf" and "parquet").
        split: The names of the splits ("hf" and "parquet").
        config: The configuration of a dataset of the hub that has several ("hf").
        fingerprint: The hash of what the dataset holds. It identifies the data, wherever and in
            whatever files it is stored. A plan fills it in. If it is given, other data is refused.
        root: The folder of an existing copy of CIFAR or ImageNet. By default CIFAR is downloaded,
            and ImageNet is expected in the folder `imagenet`.
        image_size: Resize the shorter side to this many pixels, and crop the centre.
        pad: The zero padding before a random crop, in pixels.
        flip: Whether training images are mirrored horizontally at random.
        random_resized_crop: Whether to train on random parts of the images, resized to
            `image_size`. The images then stay encoded until a batch needs them.
        crop_pct: With `random_resized_crop`, the side of the central crop of a validation image
            as a fraction of the image's shorter side.
        augment: The names of further transforms for training images, applied after crop and flip:
            "randaugment", "autoaugment", "trivialaugment", "random_erasing" and "color_jitter" of
            torchvision, "cutout" (a grey square of up to half the side), or a list of them. "own"
            says that a dataset of your own gives random images.
        mixup: The alpha of Mixup: training images are mixed with others, with shares drawn from
            Beta(alpha, alpha).
        cutmix: The alpha of CutMix: a box of the image is replaced by that of another image. With
            both, each image has one of them.
        mean: The mean of each channel, in [0, 1]; by default measured on the training images.
        std: The standard deviation of each channel, in [0, 1]; by default measured on the training
            images.
        holdout: Validate on this many training images instead, and do not train on them. They are
            drawn by a hash of their index, from every class in proportion to its size; from each
            class at least one if there are as many.
        limit: Keep only this many training images, after `holdout`, drawn in the same way.
    """

    name: str
    columns: Columns = Columns()
    split: Splits = Splits()
    config: str | None = None
    fingerprint: str | None = Field(None, pattern="^[0-9a-f]{16}$")
    root: str | None = None
    image_size: int | None = Field(None, ge=1, le=4096)
    pad: int = Field(0, ge=0, le=1000)
    flip: bool = False
    random_resized_crop: bool = False
    crop_pct: float = Field(1.0, ge=0.01, le=1)
    augment: tuple[Augment, ...] = ()
    mixup: float | None = Field(None, gt=0)
    cutmix: float | None = Field(None, gt=0)
    mean: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    std: tuple[Annotated[float, Field(ge=1e-6)], ...] | None = None
    holdout: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=1)

    @field_validator("augment", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.random_resized_crop:
            if self.image_size is None:
                raise ValueError("random_resized_crop needs image_size, the side to resize to")
            if self.pad:
                raise ValueError("pad: cannot be combined with random_resized_crop")
        elif self.crop_pct != 1:
            raise ValueError("crop_pct: needs random_resized_crop")
        if not self.name.startswith(("hf:", "parquet:")):
            for field in ("columns", "split", "config"):
                if getattr(self, field) != Data.model_fields[field].default:
                    raise ValueError(f"{field}: only for data named hf:NAME or parquet:PATH")
        return self

    @property
    def augmented(self) -> bool:
        """Whether an image can look different in different epochs."""
        cropped = self.pad > 0 or self.flip or self.random_resized_crop
        return cropped or bool(self.augment) or self.mixes

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed from two images."""
        return self.mixup is not None or self.cutmix is not None


def _check_unused(part: Part, *fields: str) -> None:
    """Raise ValueError if fields are set that an optimizer or schedule of the user does not get."""
    for field in fields:
        if getattr(part, field) != type(part).model_fields[field].default:
            name = getattr(part, "name", "")
            raise ValueError(
                f"{field} is {getattr(part, field)!r}: {name} is from a plug-in and does not get "
                f"it: expected args: {{{field}: ...}} where the plug-in has this argument"
            )


class Optimizer(Part):
    """The arguments of timm's optimizer factory, or of an optimizer of the user.

    Attributes:
        name: The name of an optimizer in timm or in a plug-in, or "dot", the distillation-oriented
            trainer, which has a momentum for each of the two terms of a loss.
        lr: The learning rate.
        weight_decay: The weight decay.
        momentum: The momentum.
        betas: The betas of Adam and similar optimizers; by default those of the optimizer.
        delta: Of "dot": its momenta are `momentum` + `delta` for the distillation term and
            `momentum` - `delta` for the cross-entropy term.
        args: Further arguments for the factory.
    """

    name: str = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    betas: tuple[float, ...] | None = None
    delta: float = Field(0.075, ge=0)
    args: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Optimizer:
        if self.name in OPTIMIZERS:
            _check_unused(self, "momentum", "betas")
        if self.name != "dot" and self.delta != Optimizer.model_fields["delta"].default:
            raise ValueError(f"delta is {self.delta}: only for dot, and name is {self.name!r}")
        if self.name == "dot":
            for field in ("betas", "args"):
                if getattr(self, field):
                    raise ValueError(f"{field} is {getattr(self, field)!r}: dot has no {field}")
            if not 0 <= self.momentum - self.delta <= self.momentum + self.delta < 1:
                raise ValueError(
                    f"delta is {self.delta}: expected momentum - delta of at least 0 and "
                    f"momentum + delta below 1, where momentum is {self.momentum}"
                )
        return self


class Schedule(Part):
    """The arguments of timm's scheduler factory; the scheduler steps after every update.

    Attributes:
        name: The name of a schedule in timm or in a plug-in, or "constant".
        warmup_epochs: The length of the warm-up, in epochs.
        warmup_lr: The learning rate at the start of the warm-up.
        min_lr: The lower bound of the learning rate.
        decay_rate: The factor of each decay ("multistep", "step"), or the power ("poly").
        milestones: The epochs of the decays ("multistep").
        decay_epochs: The number of epochs between decays ("step").
        args: Arguments of a schedule in a plug-in.
    """

    name: str = "cosine"
    warmup_epochs: float = Field(0, ge=0)
    warmup_lr: float = Field(0.0, ge=0)
    min_lr: float = Field(0.0, ge=0)
    decay_rate: float = Field(0.1, gt=0, le=1)
    milestones: tuple[int, ...] = ()
    decay_epochs: float = Field(30, gt=0)
    args: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if self.name in SCHEDULES:
            SCHEDULES[self.name].arguments(self.args, "schedule.args")
            _check_unused(self, "decay_rate", "milestones", "decay_epochs")
            return self
        if self.name not in BUILT_IN_SCHEDULES:
            hint = nearest(self.name, [*BUILT_IN_SCHEDULES, *SCHEDULES])
            raise ValueError(f"name is {self.name!r}; {hint}")
        if self.args:
            raise ValueError(f"args: only for a schedule in a plug-in, and {self.name} is timm's")
        if self.name == "multistep" and not self.milestones:
            raise ValueError("multistep needs milestones, the epochs of its decays")
        return self


class Weights(Part):
    """A teacher with existing weights.

    Attributes:
        name: The name of the network in timm.
        args: Further arguments for `timm.create_model`.
        weights: "pretrained" (timm's weights) or the path of a file (safetensors, or a state dict
            that `torch.save` wrote).
        sha256: The SHA-256 of that file. It identifies the teacher, wherever the file is.
        mean: The mean of each channel of the images for which the file was trained, in [0, 1]; by
            default that of the student's images.
        std: The standard deviation that belongs to it.
    """

    name: str
    args: dict[str, Any] = {}
    weights: str
    sha256: str | None = None
    mean: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    std: tuple[Annotated[float, Field(ge=1e-6)], ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Weights:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: expected both or neither")
        if (
            self.mean is not None
            and self.std is not None
            and not (0 < len(self.mean) == len(self.std))
        ):
            raise ValueError("mean and std: expected one number each for each channel")
        return self


class Resources(Part):
    """The resources that trials request from the cluster; they do not change any result.

    Attributes:
        cpus_per_worker: The number of CPUs per worker, which decode its images; by default one, and
            on nodes with GPUs the CPUs of a node that belong to its share of the GPUs.
        gpus_per_worker: The number of GPUs per worker; by default one if the cluster has any. With
            a fraction, several trials of one worker share a GPU.
        concurrent: The number of gangs that run at once, even if they do not fit yet, for clusters
            that grow on request; by default as many as fit. A trial alone is a gang of one.
        gang: The largest number of trials that step through one stream of images in one process,
            which prepares each batch once and runs each teacher once for them. "auto" does so where
            that saves time, and keeps all cores and GPUs busy; 1 gives each trial its own process.
        patience: The seconds without a step after which a worker is considered hung.
    """

    cpus_per_worker: float | None = Field(None, gt=0)
    gpus_per_worker: float | None = Field(None, ge=0)
    concurrent: int | None = Field(None, ge=1)
    gang: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    patience: float = Field(1800, gt=0)

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_gpus(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            said = "expected a whole number of GPUs, or a fraction of one"
            raise PydanticCustomError("gpus", said)
        return gpus


class Seeds(Part):
    """Seeds that are added until the order of the methods is decided.

    All cells begin with `min` seeds. At each look, the reference is compared with every other
    method; the methods that are still open, and the reference, get more seeds until the next look.

    Attributes:
        min: The number of seeds of each cell at the first look.
        max: The number of seeds at the last look.
        until: What ends the seeds of a method: "decided" for its comparison with the reference.
        effect: The smallest effect of interest, in points of top-1: a method also gets no more
            seeds if the interval of its difference from the reference lies within ± this value.
        first: The first seed; the others follow it.
    """

    min: int = Field(3, ge=3)
    max: int = Field(ge=3, le=1000)
    until: Literal["decided"]
    effect: float | None = Field(None, gt=0)
    first: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Seeds:
        if self.max <= self.min:
            raise ValueError(f"max is {self.max}: expected more seeds than min, {self.min}")
        return self

    @property
    def all(self) -> list[int]:
        """The seeds of a cell that is never decided."""
        return list(range(self.first, self.first + self.max))

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of seeds at which the methods are compared: each about half more."""
        ratio = self.max / self.min
        steps = math.ceil(math.log(ratio) / math.log(1.5))
        return tuple(
            dict.fromkeys(round(self.min * ratio ** (i / steps)) for i in range(steps + 1))
        )
