"""Trials: one training run, fully specified and identified by a hash of its settings.

A teacher that has to be trained is itself a `Trial` inside the student's trial. This file imports
neither torch nor Ray. experiment.py and planning.py turn a YAML file into trials.
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

from pld_ray.config.parts import WHERE, Data, Model, Optimizer, Schedule, Weights
from pld_ray.config.validation import Part, sentence
from pld_ray.errors import nearest
from pld_ray.losses import REGISTRY, LossParams

SEEDS = 2**31  # seeds are below it


def _loss(value: Any) -> LossParams:
    """Validate the settings of a loss by its name; the string x is short for {name: x}."""
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
    """One training run, fully specified.

    Attributes:
        data: The dataset and its augmentation.
        student: The network to train.
        teacher: The teacher: a trial if it has to be trained, or existing weights.
        teacher_logits: The type in which the bank stores the teacher's logits: "float16",
            "float32", or "top64" (in float16, the 64 best ones of each image). With "live", the
            teacher's forward pass runs in every step instead.
        views: The number of different augmentations of an image: epoch e uses the same images and
            teacher logits as epoch e mod `views`. By default every epoch has its own.
        loss: The loss and its parameters.
        optimizer: The optimizer.
        schedule: The schedule of the learning rate.
        epochs: The number of epochs.
        validate_every: The number of epochs after which the student is evaluated on the validation
            images again; it always is after the last epoch. The other epochs have no metrics on
            these images, and `best_top1` is the best of the epochs that have.
        batch_size: The global batch size; it is split evenly among the workers.
        drop_last: Whether to drop the last batch of an epoch if it is smaller.
        clip_grad: The maximum norm of the gradient; by default it is not clipped.
        ema: The decay of an exponential moving average of the weights; by default none is kept.
        precision: The precision of the forward passes; "auto" is bfloat16 on CUDA.
        channels_last: Whether images use the channels-last memory format.
        compile: Whether to compile the student with `torch.compile`.
        cuda_graphs: Whether the steps on a GPU are replayed as a CUDA graph where they can be. The
            results are the same.
        workers: The number of workers that train the student together.
        metrics: Further metrics of every epoch, from plug-ins, by name.
        plugins: The digest of the source of each plug-in that provides its loss, its networks, its
            dataset or another part, by the name of the plug-in. A plan fills it in.
        seed: The random seed.
    """

    data: Data
    student: Model
    teacher: Trial | Weights | None = None
    teacher_logits: Literal["float16", "float32", "top64", "live"] = "float16"
    views: int | None = Field(None, ge=1)
    loss: Loss
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    epochs: int = Field(ge=1)
    validate_every: int = Field(1, ge=1)
    batch_size: int = Field(128, ge=1)
    drop_last: bool = False
    clip_grad: float | None = Field(None, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    channels_last: bool = True
    compile: bool = False
    cuda_graphs: bool = True
    workers: int = Field(1, ge=1)
    metrics: tuple[str, ...] = ()
    plugins: dict[str, str] = {}
    seed: int = Field(0, ge=0, lt=SEEDS)

    @field_validator("metrics")
    @classmethod
    def _metrics_once(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"{list(metrics)}: expected each metric once")
        return metrics

    @model_validator(mode="after")
    def _consistent(self) -> Trial:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size is {self.batch_size}: expected a multiple of workers, which is "
                f"{self.workers}"
            )
        if "." in self.student.name:
            raise ValueError(
                f"student is {self.student.name!r}: the tag after the dot names pretrained "
                "weights, and students are trained from scratch: expected "
                f"{self.student.name.partition('.')[0]!r}"
            )
        if self.data.mixes and self.loss.takes == "order":
            field = "mixup" if self.data.mixup else "cutmix"
            raise ValueError(
                f"data.{field}: loss {self.loss.name} ranks the classes with the label first, and "
                "a mixed image has two labels: expected a loss such as ce, kd, dist or dkd, or no "
                f"{field}"
            )
        if self.data.mixes and self.loss.takes_samples:
            field = "mixup" if self.data.mixup else "cutmix"
            raise ValueError(
                f"data.{field}: loss {self.loss.name} keeps a memory of single samples, and a "
                f"mixed image is of two: expected another loss, or no {field}"
            )
        if self.data.mixes and self.loss.paired:
            field = "mixup" if self.data.mixup else "cutmix"
            raise ValueError(
                f"data.{field}: loss {self.loss.name} compares two views of one image, and a mixed "
                f"image shows two: expected another loss, or no {field}"
            )
        if (
            self.teacher_logits == "top64"
            and self.loss.takes == "order"
            and "top_k" not in type(self.loss).model_fields
        ):
            raise ValueError(
                f"teacher.logits is 'top64': loss {self.loss.name} ranks all classes, and top64 "
                "keeps the order of 64: expected float16, float32 or live"
            )
        if self.optimizer.name == "dot":
            if getattr(self.loss, "ce_weight", 0) == 0:  # None: the loss chooses a weight above 0
                raise ValueError(
                    f"optimizer is 'dot' and loss {self.loss.name} has no ce_weight above 0: dot "
                    "needs a loss of two terms, cross-entropy and distillation; set another "
                    "optimizer for this trial, for a teacher in teacher.train"
                )
            if self.workers > 1:
                raise ValueError(
                    f"optimizer is 'dot' and workers is {self.workers}: the gradients of its two "
                    "terms are not averaged over workers: expected workers: 1"
                )
        if self.loss.needs_teacher and self.teacher is None:
            raise ValueError(f"loss {self.loss.name} needs a teacher: set the field teacher")
        return self

    @property
    def each_view(self) -> tuple[Trial, ...]:
        """The trial for each view of an image that its loss takes: itself, which is the first.

        The second one, if there is one, has the data settings of the second view.
        """
        if not self.loss.paired:
            return (self,)
        strong: tuple[Any, ...] = getattr(self.loss, "strong", ())
        data = self.data.model_copy(update={"augment": (*self.data.augment, *strong)})
        return self, self.model_copy(update={"data": data})

    def view(self, epoch: int) -> int:
        """Return the index of the augmentation that an epoch uses: 0 if there is only one."""
        if not self.data.augmented:
            return 0
        return epoch % self.views if self.views else epoch

    def validates(self, epoch: int) -> bool:
        """Return whether the student is evaluated after an epoch, the first of which is 1."""
        return epoch % self.validate_every == 0 or epoch == self.epochs

    @cached_property
    def id(self) -> str:
        """The hash of the canonical settings, as 16 hex digits."""
        before, after = self.hashed
        text = before + (f',"seed":{self.seed}' if self.seed else "") + after
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def hashed(self) -> tuple[str, str]:
        """The canonical settings (see `canonical`) as JSON, before and after the seed.

        The keys are sorted, so that the first one is never the seed.
        """
        parts: list[dict[str, Any]] = [{}, {}]
        for key, value in canonical(self).items():
            if key != "seed":
                parts[key > "seed"][key] = value
        before, after = (json.dumps(p, sort_keys=True, separators=(",", ":")) for p in parts)
        return before[:-1], after.replace("{", "," if parts[1] else "", 1)

    @property
    def provided(self) -> set[tuple[str, str]]:
        """The kinds and names that can come from a plug-in, such as that of the loss.

        A teacher that has to be trained is another trial, with names of its own.
        """
        found = {("loss", self.loss.name), ("network", self.student.name)}
        found |= {("optimizer", self.optimizer.name), ("schedule", self.schedule.name)}
        found |= {("metric", name) for name in self.metrics}
        if isinstance(self.teacher, Weights):
            found.add(("network", self.teacher.name.partition(".")[0]))
        return found | {("dataset", self.data.name.partition(":")[0])}

    @property
    def all_plugins(self) -> dict[str, str]:
        """The plug-ins that the trial and its teachers need."""
        above = self.teacher.all_plugins if isinstance(self.teacher, Trial) else {}
        return above | self.plugins

    @property
    def teacher_name(self) -> str | None:
        """The name of the teacher's network, or None without a teacher."""
        teacher = self.teacher.student if isinstance(self.teacher, Trial) else self.teacher
        return teacher.name if teacher else None

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher's network runs in every step, because no stored logits are read."""
        return self.teacher is not None and (
            self.teacher_logits == "live" or self.loss.needs_features
        )

    def model_copy(self, **kwargs: Any) -> Trial:
        """Copy the trial as pydantic does, and let the copy compute its own id."""
        copied = super().model_copy(**kwargs)
        for name in ("id", *UNSEEDED):
            copied.__dict__.pop(name, None)
        return copied

    def with_seed(self, seed: int) -> Trial:
        """Return the trial with another seed, which shares what does not depend on it."""
        copied = self.model_copy(update={"seed": seed})
        copied.__dict__ |= {name: getattr(self, name) for name in UNSEEDED}
        return copied

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings but the seed, as plain values; do not change it."""
        return self.model_dump(mode="json", exclude={"seed"})

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The settings by dotted field; do not change it.

        Teacher, loss, seed, the student's name and the fingerprint of the data are left out.
        """
        left_out = {"teacher", "loss", "plugins", "student.name", "data.fingerprint"}
        if self.teacher is None or self.loss.needs_features:  # no logits are stored
            left_out.add("teacher_logits")
        flat: dict[str, Any] = {}
        for field, value in self.settings.items():
            if field in left_out:
                continue
            if isinstance(value, dict):
                flat |= {f"{field}.{name}": part for name, part in value.items()}
            else:
                flat[field] = value
        return {field: value for field, value in flat.items() if field not in left_out}

    @property
    def label(self) -> str:
        """A short, readable name; it is not unique."""
        return f"{self.unseeded_label} seed {self.seed}"

    @cached_property
    def unseeded_label(self) -> str:
        """The label without the seed."""
        parameters = self.loss.model_dump(exclude={"name"}, exclude_defaults=True)
        said = "".join(f" {name} {_short(value)}" for name, value in parameters.items())
        return f"{self.loss.name}{said} {self.student.name}"


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


UNSEEDED = ("hashed", "unseeded_label", "settings", "flat")  # cached, and the same for every seed
NOT_IDENTITY = {"root", "compile", "cuda_graphs"}  # fields that do not change the result of a trial


def canonical(trial: Trial) -> dict[str, Any]:
    """Return the settings in the canonical form that defines the id of a trial.

    Default values are left out, so that ids stay the same when fields are added. Whole numbers have
    one form: 1.0 becomes 1. Data with a fingerprint and weights with a hash are identified by them
    and not by their paths.

    Args:
        trial: The trial.

    Returns:
        Plain values that can be written as JSON.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in NOT_IDENTITY}
        if isinstance(value, list):
            return [clean(v) for v in value]
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return value

    dump = trial.model_dump(mode="json", exclude_defaults=True)
    each: Any = dump
    while each:
        if "metrics" in each:
            each["metrics"] = sorted(each["metrics"])
        if "fingerprint" in each.get("data", {}):
            for field in WHERE:
                each["data"].pop(field, None)
        if "sha256" in each:
            each.pop("weights")
        each = each.get("teacher")
    return {"format": 1, **clean(dump)}
