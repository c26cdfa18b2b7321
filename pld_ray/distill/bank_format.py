"""The teacher bank: a teacher's logits for every view of every image, each computed once.

What the stream shows in epoch e of a seed is the same in every trial, so a grid needs the teacher's
logits for it once. They are kept in the store:

    bank     one teacher on one split of one dataset, under one augmentation and seed; its key is
             the hash of all that the logits depend on (`BankSpec`)
    view     one augmentation of all images (an epoch, unless `views` says otherwise), in the order
             in which that epoch of the seed takes them: so a trial reads it from front to back
    chunk    some 2,048 consecutive samples of a view, one file: rows, seconds spent, checksum

This file says what a bank is, how large, and who computes what (the Ledger); teacher.py computes
and reads. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pld_ray.config.trial import Trial
from pld_ray.config.validation import Part
from pld_ray.data.sampling import Ints, order

ROWS = 2048  # of a chunk, rounded up to whole batches
VAL_BATCH = 512  # validation images in a forward pass, of teacher and student
ORDER_FROM = 4096  # classes from which the teacher's order is kept too; 1000 are sorted in 3 us

Array = npt.NDArray[Any]
Split = Literal["train", "val"]

# ---------------------------------------------------------------- which bank


class BankSpec(Part):
    """All that the logits of a bank depend on."""

    model: str
    args: dict[str, Any]
    weights: str  # of the teacher: their sha256
    images: str  # the fingerprint of the dataset
    split: Split
    pad: int
    flip: bool
    seed: int  # 0 where nothing is augmented: all seeds then see the same
    bfloat16: bool  # the precision of the forward pass
    logits: Literal["float16", "float32"]
    rows: int
    random_resized_crop: bool = False

    @property
    def key(self) -> str:
        """16 hex digits; fields with a default, which came later, leave older keys as they were."""
        content = self.model_dump_json(exclude_defaults=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def order(self, view: int, size: int) -> Ints:
        """The samples of a view in the order in which they are kept."""
        return order(self.seed, view, size)


def spec(trial: Trial, split: Split, weights: str, images: str, bfloat16: bool) -> BankSpec:
    """The bank that a trial reads. Validation logits are few: they are kept in float32."""
    assert trial.teacher is not None and trial.teacher_logits != "live"
    model = trial.teacher.student if isinstance(trial.teacher, Trial) else trial.teacher
    train = split == "train"
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
    )


def about(spec: BankSpec, trial: Trial, size: int, classes: int) -> dict[str, Any]:
    """What the store says of a bank, for people and for `planned`."""
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
    """Stands for a bank before its teacher's weights and the images are known."""
    assert trial.teacher is not None
    images = trial.data.model_dump_json(exclude={"root", "pad", "flip"})
    weights = trial.teacher.model_dump_json()
    return spec(trial, split, weights, images, trial.precision == "bfloat16").key


def views(trial: Trial) -> int:
    """How many views of the training images a trial sees."""
    return min(trial.views or trial.epochs, trial.epochs) if trial.data.augmented else 1


def uses_bank(trial: Trial) -> bool:
    """Whether a trial reads a bank."""
    kept = trial.teacher_logits != "live" and not trial.loss.needs_features
    return trial.teacher is not None and kept


# ---------------------------------------------------------------- rows and chunks


def row_type(classes: int, logits: str) -> np.dtype[Any]:
    """What is kept of one sample: float32 logits [C], or float16 ones below their maximum.

    Below the maximum, because a loss sees differences of logits, and float16 is the more exact the
    smaller they are: the difference d to the best class is off by at most 2^-11 d.
    """
    if logits == "float32":
        return np.dtype([("logits", "<f4", (classes,))])
    return np.dtype([("logits", "<f2", (classes,)), ("peak", "<f4")])


def order_type(classes: int) -> np.dtype[Any]:
    """One row of the teacher's order, as `teacher_order` makes it."""
    small = "u1" if classes <= 2**8 else "<i2" if classes <= 2**15 else "<i4"
    return np.dtype([("order", small, (classes,))])


def pack(logits: Array, row: np.dtype[Any]) -> Array:
    """Logits float32 [N, C] to rows [N]."""
    rows = np.empty(len(logits), row)
    if "peak" in (row.fields or ()):
        rows["peak"] = logits.max(1)
        with np.errstate(over="ignore", invalid="ignore"):  # -inf stays -inf
            rows["logits"] = logits - rows["peak"][:, None]
    else:
        rows["logits"] = logits
    return rows


def unpack(rows: Array) -> Array:
    """Rows [N] to logits float32 [N, C]."""
    if "peak" not in (rows.dtype.fields or ()):
        return np.ascontiguousarray(rows["logits"])
    return rows["logits"].astype(np.float32) + rows["peak"][:, None]


def encode(rows: Array, seconds: float) -> bytes:
    """The file of a chunk: rows, the seconds they took (float64), a checksum of both (CRC-32)."""
    content = rows.tobytes() + struct.pack("<d", seconds)
    return content + struct.pack("<I", zlib.crc32(content))


def decode(content: Array, row: np.dtype[Any], count: int) -> tuple[Array, float] | None:
    """Rows [count], without a copy, and their seconds; None where the file is damaged."""
    end = count * row.itemsize
    if len(content) != end + 12:
        return None
    if zlib.crc32(content[: end + 8].data) != struct.unpack("<I", content[end + 8 :].tobytes())[0]:
        return None
    return content[:end].view(row), struct.unpack("<d", content[end : end + 8].tobytes())[0]
