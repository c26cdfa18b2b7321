"""The types of loss parameters, and the base class of a loss's settings.

The annotations of a loss's constructor use these names, `Annotated`, `Literal`, `Field` and the
built-in types. Nothing here imports torch, so that a plan is made without it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

Temperature = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Standardize = Literal["none", "both", "teacher"]
Takes = Literal["nothing", "logits", "order", "features"]
Transform = Literal[
    "randaugment", "autoaugment", "trivialaugment", "random_erasing", "color_jitter", "cutout"
]
Strong = Annotated[tuple[Transform, ...], Field(min_length=1)]


def _top_k(value: Any) -> Any:
    if value in (None, "auto") or (type(value) is int and value > 0):
        return value
    raise PydanticCustomError("top_k", "expected a number of classes above 0, or auto")


TopK = Annotated[int | str | None, PlainValidator(_top_k)]


def refuse_switches(model: type[BaseModel], values: Any) -> Any:
    """Return the values of a model's fields, unless true or false stands for a number.

    Pydantic would take true for 1, also in a list of numbers.

    Raises:
        ValueError: It does. The message names the field.
    """
    for name, value in values.items() if isinstance(values, dict) else ():
        given = value if isinstance(value, list | tuple) else [value]
        switch = next((each for each in given if isinstance(each, bool)), None)
        if switch is not None and (field := model.model_fields.get(name)) is not None:
            kinds = _kinds(field.annotation)
            if kinds & {int, float} and bool not in kinds:
                if given is value:
                    raise ValueError(f"{name} has {switch}: expected numbers")
                raise ValueError(f"{name} is {switch}: expected a number")
    return values


def _kinds(annotation: Any) -> set[Any]:
    """Return the types in an annotation, such as float in `tuple[Weight, ...] | None`."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _kinds(parts[0])
    return {annotation}.union(*map(_kinds, parts))


class LossParams(BaseModel):
    """The settings of one loss, as YAML gives them; fields are the constructor's arguments.

    Class attributes:
        label: The name of the loss in tables.
        takes: What the loss takes from the teacher: "nothing", its "logits", its logits and the
            "order" of the classes, sorted by the logits, or its "features".
        needs_teacher: Whether the loss compares the student with a teacher.
        needs_features: Whether the loss compares feature maps instead of logits.
        takes_samples: Whether the loss takes the indices of the training samples.
        paired: Whether the loss takes two views of each image. The second one has the transforms
            of the parameter `strong` in addition.
        source: "module:class" of the loss.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    label: ClassVar[str]
    takes: ClassVar[Takes]
    needs_teacher: ClassVar[bool]
    needs_features: ClassVar[bool]
    takes_samples: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    source: ClassVar[str]
    name: str

    @model_validator(mode="before")
    @classmethod
    def _no_switches(cls, values: Any) -> Any:
        return refuse_switches(cls, values)

    @property
    def needs_order(self) -> bool:
        """Whether a kept order saves time; with `top_k` the loss finds the first classes itself."""
        return self.takes == "order" and getattr(self, "top_k", None) is None
