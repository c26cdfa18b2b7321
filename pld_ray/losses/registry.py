"""The registry of losses: every loss by its name in YAML, with its typed parameters.

To add a loss, write its class in a file of this folder and decorate it:

    @register_loss("huber", label="Huber")
    class HuberLoss(DistillationLoss):
        \"\"\"The text that `pld-ray` shows as help.\"\"\"

        def __init__(self, delta: Annotated[float, Field(gt=0)] = 1.0, **options: Unpack[Options]):
            ...

The constructor's arguments are the parameters in YAML. The losses of this folder are read from
their source with `ast`, because importing them would import torch, which takes seconds: a plan
needs names and parameters only. A class is imported when it is first used. The decorator builds
the same description from the class itself for losses that are defined elsewhere.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import ValidationError, create_model

from pld_ray.errors import nearest
from pld_ray.losses import parameters
from pld_ray.losses.parameters import LossParams, Takes
from pld_ray.plugins import provide

_Loss = TypeVar("_Loss", bound=type[Any])
PACKAGE = "pld_ray.losses"
OPTIONS = {"ignore_index", "reduction"}  # arguments of every loss on logits
FLAGS = ("paired", "takes_samples")  # arguments of `register_loss`


def register_loss(
    name: str,
    *,
    label: str,
    takes: Takes = "logits",
    paired: bool = False,
    takes_samples: bool = False,
) -> Callable[[_Loss], _Loss]:
    """Register a loss class under its name in YAML.

    Args:
        name: The name in YAML, such as "kd".
        label: The name in tables, such as "KD".
        takes: What the loss takes from the teacher: "nothing", its "logits", its logits and the
            "order" of the classes, sorted by the logits, or its "features" (a `FeatureLoss`).
        paired: Whether the loss takes two views of each image: 2B rows, those of the first views
            and then those of the second ones. Its parameter `strong`, of the type
            `pld_ray.losses.parameters.Strong`, names the further transforms of the second views.
        takes_samples: Whether the loss, a `FeatureLoss`, takes the indices of the training samples
            (see `FeatureLoss.connect_samples`).

    The constructor then checks its arguments by their annotations.

    Raises:
        ValueError: Another loss has this name or label, or an argument has no annotation, or a
            paired loss has no parameter `strong` or takes neither nothing nor logits, or a loss
            that takes samples takes no features.
    """

    def register(cls: _Loss) -> _Loss:
        source = f"{cls.__module__}:{cls.__name__}"
        known = REGISTRY.get(name)
        if known is None:
            labels = {params.label for params in REGISTRY.values()} | {"Teacher"}
            if label in labels or name == "teacher":
                raise ValueError(
                    f"loss {name!r}: the tables have {label!r} already: expected another label"
                )
            fields = _fields(cls)
            if paired and ("strong" not in fields or takes not in ("nothing", "logits")):
                raise ValueError(
                    f"loss {name!r} is paired: expected a parameter `strong`, and takes='logits' "
                    "or 'nothing'"
                )
            if takes_samples and takes != "features":
                raise ValueError(f"loss {name!r} takes samples: expected takes='features'")
            known = REGISTRY[name] = _describe(
                name, label, takes, source, cls.__doc__, fields, paired, takes_samples
            )
        elif known.source != source:
            raise ValueError(f"loss {name!r}: {known.source} has this name already, not {source}")
        cls.name, cls.takes_samples, CLASSES[name] = name, takes_samples, cls
        provide("loss", name, cls.__module__, lambda: (REGISTRY.pop(name), CLASSES.pop(name)))
        cls.__init__ = _checked(cls.__init__, known)
        return cls

    return register


def create_loss(loss: str | LossParams, **arguments: Any) -> Any:
    """Return the torch module that computes a loss.

    Args:
        loss: The name of a loss, such as "kd", or its settings, such as `trial.loss`.
        arguments: Arguments of the loss, such as `temperature=2`, which replace those of the
            settings. All losses on logits also take `ignore_index` and `reduction`.

    Raises:
        ValueError: There is no such loss, or an argument is not valid.
    """
    name = loss if isinstance(loss, str) else loss.name
    if name not in REGISTRY:
        raise ValueError(f"unknown loss {name!r}; {nearest(name, REGISTRY)}")
    if name not in CLASSES:
        importlib.import_module(REGISTRY[name].source.partition(":")[0])
    given = {} if isinstance(loss, str) else loss.model_dump(exclude={"name"})
    return CLASSES[name](**(given | arguments))


def _describe(
    name: str,
    label: str,
    takes: Takes,
    source: str,
    doc: str | None,
    fields: dict[str, Any],
    paired: bool = False,
    takes_samples: bool = False,
) -> type[LossParams]:
    """The settings class of a loss. fields: (annotation, default) of each parameter."""
    model = create_model(name, __base__=LossParams, __doc__=doc, **fields)
    model.label, model.takes, model.source = label, takes, source
    model.needs_teacher, model.needs_features = takes != "nothing", takes == "features"
    model.paired, model.takes_samples = paired, takes_samples
    return model


def _fields(cls: type[Any]) -> dict[str, Any]:
    """(annotation, default) of each argument of a class's constructor."""
    hints = get_type_hints(cls.__init__, include_extras=True)
    found: dict[str, Any] = {}
    for argument in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if argument.kind in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL):
            continue
        if argument.name not in hints:
            raise ValueError(f"{cls.__name__}: argument {argument.name!r} has no annotation")
        default = ... if argument.default is argument.empty else argument.default
        found[argument.name] = hints[argument.name], default
    return found


def _checked(init: Callable[..., None], params: type[LossParams]) -> Callable[..., None]:
    """The constructor with its arguments validated first; ValueError names the argument."""
    signature = inspect.signature(init)
    name = params.__name__
    kinds = {argument.kind: argument.name for argument in signature.parameters.values()}
    rest = kinds.get(inspect.Parameter.VAR_KEYWORD, "")  # ignore_index and reduction
    given_names = signature.parameters.keys()

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        own = set() if rest else kwargs.keys() & OPTIONS - given_names
        if not hasattr(self, "set_options"):  # a loss on features has no such options
            own = set()
        left = {option: kwargs.pop(option) for option in own}
        given = signature.bind(self, *args, **kwargs).arguments
        given.pop(next(iter(signature.parameters)))
        options = given.pop(rest, {})
        try:
            valid = params(name=name, **given)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{name}: {field} is {first['input']!r}: {first['msg']}") from None
        init(self, **valid.model_dump(exclude={"name"}), **options)
        if left:  # a constructor without **options need not know them
            self.set_options(**left)

    return checked


# ---------------------------------------------------------------- read from source


@cache
def public_names() -> dict[str, str]:
    """The module of each public class and function of this folder, by name."""
    return {
        node.name: module
        for module, tree in _sources()
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    }


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in ("__init__", "registry", "parameters"):
            yield f"{PACKAGE}.{path.stem}", ast.parse(path.read_text(encoding="utf-8"), path.name)


def _declared() -> Iterator[tuple[str, type[LossParams]]]:
    """The losses of this folder: what their decorators would register."""
    for module, tree in _sources():
        for cls in tree.body:
            for decorator in getattr(cls, "decorator_list", ()):
                function = getattr(decorator, "func", None)
                if isinstance(cls, ast.ClassDef) and getattr(function, "id", "") == "register_loss":
                    (name,) = map(ast.literal_eval, decorator.args)
                    given = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords}
                    takes = given.get("takes", "logits")
                    source, doc = f"{module}:{cls.name}", ast.get_docstring(cls)
                    about = name, given["label"], takes, source, doc, _read(cls)
                    yield name, _describe(*about, *(given.get(flag, False) for flag in FLAGS))


def _read(cls: ast.ClassDef) -> dict[str, Any]:
    """As `_fields`, from the source of a class."""
    for init in cls.body:
        if isinstance(init, ast.FunctionDef) and init.name == "__init__":
            arguments = init.args.args[1:]
            none: list[Any] = [...] * (len(arguments) - len(init.args.defaults))
            defaults = none + [ast.literal_eval(default) for default in init.args.defaults]
            return {
                argument.arg: (_annotation(cls, argument), default)
                for argument, default in zip(arguments, defaults, strict=True)
            }
    return {}


def _annotation(cls: ast.ClassDef, argument: ast.arg) -> Any:
    assert argument.annotation is not None, f"{cls.name}: {argument.arg} has no annotation"
    return eval(ast.unparse(argument.annotation), vars(parameters))


REGISTRY: dict[str, type[LossParams]] = dict(_declared())
CLASSES: dict[str, type[Any]] = {}  # those that are imported
