"""Random resized crops and images that are decoded batch by batch."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small import chunks, live, run, weights

from pld_ray.config.parts import Data
from pld_ray.config.planning import plan
from pld_ray.config.validation import validated
from pld_ray.data.augmentation import AREA, RATIO, TRIES, centre, crop, crop_draws
from pld_ray.data.datasets import load, size
from pld_ray.data.encoded import EncodedImages, prefetch
from pld_ray.data.image_files import decode, resize
from pld_ray.data.stream import Stream
from pld_ray.distill import bank_format
from pld_ray.distill.bank import fill
from pld_ray.distill.loop import train, train_gang
from pld_ray.distill.teacher import Teacher
from pld_ray.errors import InputError
from pld_ray.store.store import Store

CPU = torch.device("cpu")


def jpeg(rng, width, height):
    array = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).resize((width, height)).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Images of different sizes in two classes, and the same ones as parquet."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        rows, labels = [], []
        for name in ("cat", "dog"):
            (tmp_path / "files" / split / name).mkdir(parents=True)
            for i in range(count):
                content = jpeg(rng, 40 + 8 * i, 64 - 4 * i)
                (tmp_path / "files" / split / name / f"{i}.jpg").write_bytes(content)
                rows.append({"bytes": content, "path": None})
                labels.append(name)
        (tmp_path / "parquet").mkdir(exist_ok=True)
        table = pa.table({"image": rows, "label": labels})
        pq.write_table(table, tmp_path / "parquet" / f"{split}-0.parquet")
    return tmp_path


def data(name, **more):
    return Data(name=name, image_size=16, random_resized_crop=True, flip=True, crop_pct=0.8, **more)


def test_crops_are_those_of_the_recipe():
    draws = crop_draws(0, 0, np.arange(4000))
    assert draws.shape == (4000, TRIES, 4) and draws.min() >= 0 and draws.max() < 1
    boxes = np.array([crop(100, 80, row) for row in draws.tolist()])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 100 and bottom.max() <= 80
    width, height = right - left, bottom - top
    area, ratio = width * height / 8000, width / height
    assert area.min() > AREA[0] - 0.01 and area.max() <= 1
    assert ratio.min() > RATIO[0] - 0.05 and ratio.max() < RATIO[1] + 0.05
    # where every try fits (the area at most 3/5 of 100x80 does) all areas are as likely
    small = area[area < 0.5]
    assert np.quantile(small, 0.5) == pytest.approx((AREA[0] + 0.5) / 2, abs=0.02)
    assert np.corrcoef(left + right, top + bottom)[0, 1] == pytest.approx(0, abs=0.05)


def test_the_first_try_that_fits_is_taken_and_the_largest_central_part_if_none_does():
    whole = [1.0, 0.5, 0.0, 0.0]  # the whole area, square: fits no oblong image
    assert crop(100, 50, [whole] * TRIES) == (16, 0, 83, 50)  # 4:3
    assert crop(50, 100, [whole] * TRIES) == (0, 16, 50, 83)
    part = [(0.125 - 0.08) / 0.92, 0.5, 0.999, 0.0]  # 25x25 of 100x50
    assert crop(100, 50, [whole, part, whole]) == (75, 0, 100, 25)
    assert centre(100, 50, 0.8) == (30, 5, 70, 45)


def test_batches_are_the_same_however_they_are_read(folder):
    files, table = (
        load(data(f"{kind}:{folder / kind}" if kind == "parquet" else f"folder:{folder / 'files'}"))
        for kind in ("files", "parquet")
    )
    assert files.shape == table.shape == (2, 3, 16) and len(files.train) == 10
    index = np.array([7, 0, 3, 9])
    for images in (files, table):
        stream = Stream(images, data("folder:x"), 5, CPU)
        (whole, labels), (again, _) = stream.train([index, index], 3)
        assert torch.equal(whole, again) and whole.shape == (4, 3, 16, 16)
        shares = list(stream.train([index[rank::2] for rank in (0, 1)], 3))
        assert torch.equal(shares[1][0], whole[1::2]) and torch.equal(shares[1][1], labels[1::2])
        assert not torch.equal(next(stream.train([index], 4))[0], whole)
    everything = np.arange(10)
    assert (table.train.decode(everything) == files.train.decode(everything)).all()
    assert table.digest == files.digest  # the data is the same, in whatever files it is


def test_pixels_are_those_of_pillow(folder):
    """Within two levels in the mean, for each image."""
    images = load(data(f"folder:{folder / 'files'}"))
    index = np.arange(10)
    draws = crop_draws(5, 2, index)
    got = images.train.decode(index, draws)
    for i in index:
        with Image.open(images.train.files.name(i)) as file:
            box = crop(*file.size, draws[i].tolist())
            expected = file.resize((16, 16), Image.Resampling.BICUBIC, box=box)
        assert np.abs(got[i].astype(int) - np.asarray(expected)).mean() < 2
    with Image.open(images.val.files.name(0)) as file:  # 40 x 64: the central 32 x 32 of 40 x 40
        expected = file.resize((16, 16), Image.Resampling.BICUBIC, box=(4, 16, 36, 48))
    centred = images.val.decode(np.array([0]))[0].astype(int)
    assert np.abs(centred - np.asarray(expected)).mean() < 2


def saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_every_kind_of_jpeg_is_read_as_pillow_reads_it():
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (8, 11, 3), dtype=np.uint8)).resize((88, 64))
    kinds = {
        "plain": saved(rough, quality=95),
        "progressive": saved(rough, quality=95, progressive=True),
        "not subsampled": saved(rough, quality=95, subsampling=0),
        "grey": saved(rough.convert("L")),
        "cmyk": saved(rough.convert("CMYK")),
        "with bytes after its end": saved(rough) + b"garbage",
    }
    for kind, content in kinds.items():
        with Image.open(io.BytesIO(content)) as image:
            expected = np.asarray(image.convert("RGB")).astype(int)
        got = decode(content, kind)
        assert got.shape == (64, 88, 3), kind
        assert np.abs(got - expected).mean() < 2, kind
    with pytest.raises(InputError, match="^half: cannot be read as an image: "):
        decode(kinds["plain"][:500], "half")
    huge = bytearray(kinds["plain"])
    place = huge.index(b"\xff\xc0") + 5  # height and width in the frame header
    huge[place : place + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(InputError, match="^huge: cannot be read as an image: .*4294836225 pixels"):
        decode(bytes(huge), "huge")


def test_resize_is_bicubic_with_antialiasing_and_sees_the_part_alone():
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for side, box in ((10, None), (50, None), (8, (3, 5, 27, 35))):
        part = Image.fromarray(image).crop(box or (0, 0, 30, 40))
        expected = np.asarray(part.resize((side, side), Image.Resampling.BICUBIC))
        assert np.abs(resize(image, side, side, box).astype(int) - expected).max() <= 2
    assert (resize(image, 24, 24, (3, 5, 27, 29)) == image[5:29, 3:27]).all()


def test_statistics_limit_and_identity(folder):
    name = f"folder:{folder / 'files'}"
    images = load(data(name))
    pixels = images.train.decode(np.arange(10)) / 255
    assert images.mean == pytest.approx(pixels.mean((0, 1, 2)))
    assert images.std == pytest.approx(pixels.std((0, 1, 2)))
    assert len(load(data(name, limit=3)).train) == 3
    assert load(data(name)).digest == images.digest
    assert load(data(name, mean=(0, 0, 0), std=(1, 1, 1))).mean == (0, 0, 0)
    (folder / "files/train/cat/0.jpg").write_bytes(jpeg(np.random.default_rng(1), 80, 80))
    assert load(data(name)).digest != images.digest
    assert size(Data(name="imagenet")) == (1281167, 50000, 1000)


def test_bad_images_and_settings_are_told(folder):
    (folder / "files/val/dog/1.jpg").write_bytes(b"no image")
    images = load(data(f"folder:{folder / 'files'}"))
    with pytest.raises(InputError, match=r"/val/dog/1.jpg: cannot be read as an image"):
        list(Stream(images, data("folder:x"), 0, CPU).val([np.arange(4)]))
    with pytest.raises(InputError, match="'imagenet': 2 classes in .*files, expected 1000"):
        load(data("imagenet", root=str(folder / "files")))
    for fields, message in (
        ({"name": "folder:x", "random_resized_crop": True}, "needs image_size"),
        ({"name": "folder:x", "crop_pct": 0.9}, "crop_pct: needs random_resized_crop"),
    ):
        with pytest.raises(InputError, match=message):
            validated(Data, fields, "test")
    with pytest.raises(InputError, match="random_resized_crop: digits has small images"):
        size(Data(name="digits", image_size=8, random_resized_crop=True))


def test_ahead_keeps_the_order_and_passes_errors_on():
    assert list(prefetch(lambda x: x * x, range(7))) == [0, 1, 4, 9, 16, 25, 36]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda x: 1 / x, [1, 0]))


def test_a_student_of_the_bank_and_one_of_a_live_teacher_see_the_same_crops(
    experiment, folder, tmp_path
):
    text = f"""
base:
  data:
    name: "folder:{folder / "files"}"
    image_size: 16
    random_resized_crop: true
    flip: true
  student: resnet8
  teacher: {{name: resnet8, logits: float32}}
  epochs: 2
  batch_size: 4
  loss: pld
"""
    trial, store = plan(experiment(text)).cells[0].trial, Store(tmp_path / "results")
    assert bank_format.views(trial) == 2
    run(trial, store)
    run(live(trial), store)
    assert weights(store, trial) == weights(store, live(trial))
    assert store.record(trial.id)["teacher_images"] == 2 * 10 + 4


class Granting:
    """A ledger that gives out every chunk and notes what happens to it."""

    def __init__(self):
        self.said = []

    def claim(self, store, chunks, holder, patience):
        self.said.append(("claim", chunks[0].split("/", 1)[1]))
        return chunks[0]

    def renew(self, store, chunk, holder):
        pass

    def release(self, store, chunk, holder, computed):
        self.said.append((computed, chunk.split("/", 1)[1]))


FILLING = """
base:
  data: {{name: "folder:{folder}", image_size: 16, random_resized_crop: true, flip: true}}
  student: resnet8
  teacher: {{name: resnet8, train: {{epochs: 1}}}}
  epochs: 2
  batch_size: 2
  drop_last: {drop_last}
grid: {{loss: [kd, dist, pld]}}
"""


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("drop_last", ["false", "true"])
def test_a_bank_is_filled_from_the_batches_of_the_training(
    experiment, folder, tmp_path, monkeypatch, members, drop_last
):
    (folder / "files/train/dog/5.jpg").write_bytes(jpeg(np.random.default_rng(1), 50, 40))
    monkeypatch.setattr(bank_format, "ROWS", 4)  # 11 images: chunks of 4, 4 and 3
    text = FILLING.format(folder=folder / "files", drop_last=drop_last)
    trials = [cell.trial for cell in plan(experiment(text)).cells][:members]
    stores = [Store(tmp_path / name) for name in ("filled", "trained", "alone")]
    images, decoded, ledger = load(trials[0].data), [], Granting()
    for store in stores:
        train(trials[0].teacher, images, store, lambda metrics: None)
    decode = EncodedImages.decode

    def counted(self, index, draws=None):
        decoded.extend(index.tolist() if draws is not None else [])
        return decode(self, index, draws)

    monkeypatch.setattr(EncodedImages, "decode", counted)
    train_gang(
        trials, images, stores[1], lambda epochs: None, lambda *end: None, ledger, device=CPU
    )
    if drop_last == "false":  # each image once in an epoch
        assert sorted(decoded) == sorted([*range(11), *range(11)])
        assert ledger.said[:2] == [("claim", "0/0.logits"), (True, "0/0.logits")]
        assert len([what for what, _ in ledger.said if what is True]) == 2 * 3 + 1  # and val
    fill(trials[0], images, stores[0], None, "test", CPU)
    assert [path.name for path in chunks(stores[0])] == [path.name for path in chunks(stores[1])]
    for one, other in zip(chunks(stores[0]), chunks(stores[1]), strict=True):
        assert one.read_bytes()[:-12] == other.read_bytes()[:-12]  # seconds and checksum follow
    for trial in trials:
        run(trial, stores[2])
        assert weights(stores[2], trial) == weights(stores[1], trial)
    if members == 1:
        assert stores[1].record(trials[0].id)["teacher_images"] == 2 * 11 + 4


def test_a_chunk_that_is_not_finished_is_given_back(experiment, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_format, "ROWS", 4)
    text = FILLING.format(folder=folder / "files", drop_last="false")
    trial, store = plan(experiment(text)).cells[0].trial, Store(tmp_path / "results")
    images, ledger = load(trial.data), Granting()
    train(trial.teacher, images, store, lambda metrics: None)
    forward, calls = Teacher.__call__, []

    def broken(self, x):
        calls.append(len(x))
        if len(calls) == 3:  # after the validation images: the second batch of the first chunk
            raise ValueError("no teacher today")
        return forward(self, x)

    monkeypatch.setattr(Teacher, "__call__", broken)
    with pytest.raises(ValueError, match="no teacher today"):
        train(trial, images, store, lambda metrics: None, ledger)
    assert ledger.said[-2:] == [("claim", "0/0.logits"), (False, "0/0.logits")]
    monkeypatch.undo()
    monkeypatch.setattr(bank_format, "ROWS", 4)
    train(trial, images, store, lambda metrics: None)
    other = Store(tmp_path / "other")
    run(trial, other)
    assert weights(store, trial) == weights(other, trial)
