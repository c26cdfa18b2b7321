"""The format of the teacher bank: the stored logits of a teacher for every view of every image.

All trials with the same seed see the same augmented images in epoch e. A grid therefore needs the
teacher's logits of these images only once. The store keeps them in three levels:

    bank     one teacher on one split of one dataset, under one augmentation and seed; its key is
             the hash of everything that the logits depend on (`BankSpec`)
    view     one augmentation of all images (one epoch, unless `views` is set), in the sample order
             of that epoch, so that a trial reads the view from front to back
    chunk    about 2,048 consecutive samples of a view in one file: rows, seconds spent, checksum

This module defines the keys of banks, the types of rows and the files of chunks. bank.py computes
and reads the chunks. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pld_ray import plugins
from pld_ray.config.parts import ON_THE_FLY
from pld_ray.config.trial import Trial
from pld_ray.config.validation import Part
from pld_ray.data.sampling import Ints, order
from pld_ray.losses.sorting import CLASS, sort_keys

ROWS = 2048  # samples per chunk, rounded up to whole batches
VAL_BATCH = 512  # validation images per forward pass, for the teacher and for the student
# With this many classes or more, the teacher's order is stored too. Sorting 1000 takes only 3 us.
ORDER_FROM = 4096
BEST = 64  # logits of a sample that "top64" keeps

Array = npt.NDArray[Any]
Split = Literal["train", "val"]


class BankSpec(Part):
    """Everything that the logits of a bank depend on.

    Attributes:
        model: Name of the teacher's network.
        args: Further arguments of the network.
        weights: SHA-256 of the teacher's weights.
        images: Hash of the images (`Images.digest`).
        split: "train" or "val".
        pad: Zero padding before the random crop, in pixels.
        flip: Whether images are flipped at random.
        seed: Seed of the augmentation. It is 0 if there is no augmentation, because all seeds then
            see the same images.
        bfloat16: Whether the teacher's forward pass runs in bfloat16.
        logits: Type in which the logits are stored; see `row_type`.
        rows: Number of samples per chunk.
        random_resized_crop: Whether the images are random resized crops.
        augment: Names of further transforms.
        mixup: Alpha of Mixup, if images are mixed.
        cutmix: Alpha of CutMix, if images are mixed.
        mean: Mean of the images for which a teacher's weights file was trained, if it says so.
        std: The standard deviation that belongs to it.
        plugins: Digests of the plug-ins that provide the teacher's network or the dataset.
    """

    model: str
    args: dict[str, Any]
    weights: str
    images: str
    split: Split
    pad: int
    flip: bool
    seed: int
    bfloat16: bool
    logits: Literal["float16", "float32", "top64"]
    rows: int
    random_resized_crop: bool = False
    augment: tuple[str, ...] = ()
    mixup: float | None = None
    cutmix: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    plugins: dict[str, str] = {}

    @property
    def key(self) -> str:
        """Return the key of the bank: 16 hexadecimal digits.

        Fields at their default value are not hashed, so a new field with a default does not change
        existing keys.
        """
        content = self.model_dump_json(exclude_defaults=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def order(self, view: int, size: int) -> Ints:
        """Return the sample indices of a view in the order in which they are stored.

        Args:
            view: Index of the view.
            size: Number of samples in the split.

        Returns:
            A permutation of 0 .. size - 1.
        """
        return order(self.seed, view, size)


def spec(trial: Trial, split: Split, weights: str, images: str, bfloat16: bool) -> BankSpec:
    """Return the specification of the bank that a trial reads.

    Validation logits are always stored in float32, because there are few of them.

    Args:
        trial: A trial with a teacher whose logits are stored.
        split: "train" or "val".
        weights: SHA-256 of the teacher's weights.
        images: Hash of the images (`Images.digest`).
        bfloat16: Whether the teacher's forward pass runs in bfloat16.
    """
    assert trial.teacher is not None and trial.teacher_logits != "live"
    model = trial.teacher.student if isinstance(trial.teacher, Trial) else trial.teacher
    train = split == "train"
    own = plugins.used(
        [("network", model.name.partition(".")[0]), ("dataset", trial.data.name.partition(":")[0])]
    )
    return BankSpec(
        model=model.name,
        args=model.args,
        weights=weights,
        images=images,
        split=split,
        pad=trial.data.pad if train else 0,
        flip=trial.data.flip and train,
        seed=trial.seed if train and trial.data.augmented else 0,
        bfloat16=bfloat16,
        logits=trial.teacher_logits if train else "float32",
        rows=math.ceil(ROWS / trial.batch_size) * trial.batch_size if train else ROWS,
        random_resized_crop=trial.data.random_resized_crop and train,
        augment=trial.data.augment if train else (),
        mixup=trial.data.mixup if train else None,
        cutmix=trial.data.cutmix if train else None,
        mean=getattr(trial.teacher, "mean", None),
        std=getattr(trial.teacher, "std", None),
        plugins={name: plugin.digest for name, plugin in sorted(own.items())},
    )


def about(spec: BankSpec, trial: Trial, size: int, classes: int) -> dict[str, Any]:
    """Return the description that the store keeps with a bank, for users and for `bank_plan`.

    Args:
        spec: The specification of the bank.
        trial: A trial that reads the bank.
        size: Number of samples in the split.
        classes: Number of classes.
    """
    teacher = trial.teacher
    return {
        "teacher": spec.model,
        "trial": teacher.id if isinstance(teacher, Trial) else None,
        "data": trial.data.name,
        "size": size,
        "classes": classes,
        "spec": spec.model_dump(),
        "planned": planned_key(trial, spec.split),
    }


def planned_key(trial: Trial, split: Split) -> str:
    """Return a key for a bank before the teacher's weights and the images are known.

    The settings of the teacher and of the dataset replace their hashes.
    """
    assert trial.teacher is not None
    images = trial.data.model_dump_json(exclude={"root", *ON_THE_FLY})
    weights = trial.teacher.model_dump_json()
    return spec(trial, split, weights, images, trial.precision == "bfloat16").key


def views(trial: Trial) -> int:
    """Return the number of views of the training images that a trial sees."""
    return min(trial.views or trial.epochs, trial.epochs) if trial.data.augmented else 1


def uses_bank(trial: Trial) -> bool:
    """Return whether a trial reads a bank."""
    return trial.teacher is not None and not trial.runs_teacher


def row_type(classes: int, logits: str) -> np.dtype[Any]:
    """Return the numpy type of one stored sample.

    float32 logits are stored as they are. float16 logits are stored as differences to their
    maximum (`peak`): a loss depends only on differences of logits, and float16 is more precise for
    small numbers. The difference d to the best class has an error of at most 2^-11 d.

    top64 stores the float16 logits of the 64 best classes, these classes, and the logarithm of the
    probability of all other classes together (`rest`, at temperature 1, -inf if they have none).

    Args:
        classes: Number of classes C.
        logits: "float16", "float32" or "top64".

    Returns:
        A structured type with the field "logits": [C], or [64] for top64. float16 and top64 have
        the field "peak" too, and top64 has "classes" [64] and "rest".
    """
    if logits == "float32":
        return np.dtype([("logits", "<f4", (classes,))])
    if logits == "float16":
        return np.dtype([("logits", "<f2", (classes,)), ("peak", "<f4")])
    best = [("logits", "<f2", (BEST,)), ("classes", _index_type(classes), (BEST,))]
    return np.dtype([*best, ("peak", "<f4"), ("rest", "<f4")])


def _index_type(classes: int) -> str:
    """Return the smallest type that `teacher_order` uses for the indices of classes."""
    return "u1" if classes <= 2**8 else "<i2" if classes <= 2**15 else "<i4"


def keeps_order(classes: int, logits: str) -> bool:
    """Return whether a bank stores the teacher's order too, for losses that rank the classes.

    For top64 it does not: an order of C classes is larger than such a row, and only 64 of its
    places are known. The loss sorts the logits that are read.
    """
    return classes >= ORDER_FROM and logits != "top64"


def order_type(classes: int) -> np.dtype[Any]:
    """Return the numpy type of one row of the teacher's order, as `teacher_order` computes it."""
    return np.dtype([("order", _index_type(classes), (classes,))])


def pack(logits: Array, row: np.dtype[Any]) -> Array:
    """Convert float32 logits [N, C] to rows [N] of the type `row`.

    For top64, the 64 best classes and the rest's probability are those of the logits that a
    float16 bank returns. Of classes with equal logits, those with the lower index are kept.
    """
    rows, fields = np.empty(len(logits), row), row.fields or ()
    if "peak" not in fields:
        rows["logits"] = logits
        return rows
    rows["peak"] = logits.max(1)
    with np.errstate(over="ignore", invalid="ignore"):  # logits of -inf stay -inf
        half = (logits - rows["peak"][:, None]).astype(np.float16)
        if "rest" not in fields:
            rows["logits"] = half
            return rows
        read = half.astype(np.float32) + rows["peak"][:, None]
        keys = sort_keys(0 - read)  # avoids -0.0
        classes = np.sort(np.partition(keys, BEST - 1, axis=1)[:, :BEST] & CLASS, axis=1)
        best = _logsumexp(np.take_along_axis(read, classes, 1))
        np.put_along_axis(read, classes, -np.inf, 1)
        rest = _logsumexp(read)
        rows["logits"] = np.take_along_axis(half, classes, 1)
        rows["classes"] = classes
        rows["rest"] = rest - np.logaddexp(best, rest)
    return rows


def unpack(rows: Array, classes: int) -> Array:
    """Convert rows [N] to float32 logits [N, C].

    For top64, the 64 best logits are those of a float16 bank. The other n = C - 64 classes get the
    same logit u, with which softmax gives them together the stored probability r:

        u = logsumexp(best) + log r - log(1 - r) - log n

    This is the logarithm of the mean of their exp(logit), which is at most the least of the best
    logits. Here u is also kept below it by at least one rounding step, so that a sort puts the 64
    best classes first, in the order in which it puts the logits of a float16 bank.

    Compared with a float16 bank, at temperature 1: PLD with top_k <= 64 is the same for a label
    among the 64. The part of KD that depends on the student changes by at most r times the spread
    of the student's log-probabilities over the others, and its gradient by 2 r in the 1-norm. At
    temperatures T > 1, no other rest with this r has more mass m than the even one, by concavity;
    the change of KD is at most T m (max s - min s) for student logits s, that of its gradient 2 T
    m. The same holds for the part of DKD among the classes other than the label, with their mass m.
    The correlation of DIST between the classes of a sample changes by at most 4 m, divided by the
    norm of the centred probabilities. docs/bank.md proves this.

    Args:
        rows: Rows of a type that `row_type` returns.
        classes: Number of classes C.
    """
    fields = rows.dtype.fields or ()
    if "peak" not in fields:
        return np.ascontiguousarray(rows["logits"])
    known = rows["logits"].astype(np.float32) + rows["peak"][:, None]
    if "rest" not in fields:
        return known
    log_r = rows["rest"].astype(np.float64)
    other = _logsumexp(known) + log_r - np.log(-np.expm1(log_r)) - math.log(classes - BEST)
    below = np.nextafter(known.min(1), np.float32(-np.inf))
    logits = np.empty((len(rows), classes), np.float32)
    logits[:] = np.minimum(other.astype(np.float32), below)[:, None]
    np.put_along_axis(logits, rows["classes"].astype(np.int64), known, 1)
    return logits


def _logsumexp(x: Array) -> Array:
    """Return log sum exp of each row of float32 logits [N, M], float64: -inf if all are -inf."""
    top = x.max(1)
    top[np.isinf(top)] = 0
    with np.errstate(divide="ignore"):
        found: Array = top + np.log(np.exp(x - top[:, None]).sum(1, dtype=np.float64))
    return found


def encode(rows: Array, seconds: float) -> bytes:
    """Return the content of a chunk file: the rows, the seconds (float64) and a CRC-32 of both.

    Args:
        rows: The rows of the chunk [N].
        seconds: Time that it took to compute the logits.
    """
    content = rows.tobytes() + struct.pack("<d", seconds)
    return content + struct.pack("<I", zlib.crc32(content))


def decode(content: Array, row: np.dtype[Any], count: int) -> tuple[Array, float] | None:
    """Decode the content of a chunk file.

    Args:
        content: The bytes of the file, as a uint8 array.
        row: The type of a row.
        count: Number of rows that the chunk should have.

    Returns:
        The rows [count], which share the memory of `content`, and the seconds that it took to
        compute them; None if the file is damaged.
    """
    end = count * row.itemsize
    if len(content) != end + 12:
        return None
    if zlib.crc32(content[: end + 8].data) != struct.unpack("<I", content[end + 8 :].tobytes())[0]:
        return None
    return content[:end].view(row), struct.unpack("<d", content[end : end + 8].tobytes())[0]
