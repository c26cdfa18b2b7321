"""Data as people have it on their disks: what is read, and what is refused with its name."""

import io
import json
import os
import tarfile
import zlib

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pld_ray.config.parts import Columns, Data, Splits
from pld_ray.config.validation import validated
from pld_ray.data.datasets import load, size
from pld_ray.data.stream import Stream
from pld_ray.errors import InputError, MissingError

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")


def picture(c, i):
    """An image of 6x6 pixels of class c, in which channel c is the brightest."""
    pixels = np.random.default_rng(100 * c + i).integers(0, 80, (6, 6, 3)).astype(np.uint8)
    pixels[..., c] += 120
    return Image.fromarray(pixels)


def png(c, i, **options):
    buffer = io.BytesIO()
    picture(c, i).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three classes with 4 training and 2 validation images each."""
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        for c, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for i in numbers:
                (tmp_path / split / name / f"{i}.png").write_bytes(png(c, i))
    return tmp_path


def found(folder, **settings):
    return load(Data(name=f"folder:{folder}", **settings))


def refused(folder, *parts, **settings):
    with pytest.raises(InputError) as error:
        images = found(folder, **settings)
        list(Stream(images, Data(name="x"), 0, CPU).val([np.arange(6)]))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_hidden_files_and_folders_are_not_data(folder):
    for path in ("train/.ipynb_checkpoints", "val/.ipynb_checkpoints", "train/ant/.thumbs"):
        (folder / path).mkdir()
    (folder / "train/ant/.thumbs/0-checkpoint.png").write_bytes(png(0, 0))
    (folder / "train/ant/._0.png").write_bytes(b"what macOS writes")
    (folder / "train/ant/Thumbs.db").write_bytes(b"what Windows writes")
    images = found(folder)
    assert images.classes == 3 and (len(images.train), len(images.val)) == (12, 6)
    assert size(Data(name=f"folder:{folder}")) == (12, 6, 3)


def test_a_class_without_readable_images_is_refused(folder):
    for file in (folder / "train/ant").iterdir():
        file.rename(file.with_suffix(".HEIC"))
    refused(folder, "train/ant has 4 images that cannot be read, such as 0.HEIC", ".jpeg, .jpg, ")
    for file in (folder / "train/ant").iterdir():
        file.unlink()
    refused(folder, "the class ", "train/ant has no images", ".jpeg, .jpg, ")


def test_one_image_that_would_be_left_out_is_refused(folder):
    (folder / "val/cat/4.png").rename(folder / "val/cat/4.gif")
    refused(folder, "val/cat has 1 images that cannot be read, such as 4.gif")


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_images_of_16_bits_use_their_full_range(folder, order):
    ramp = np.linspace(0, 65535, 256 * 4).reshape(32, 32).round().astype(np.uint16)
    (folder / "val/ant/4.png").unlink()
    Image.fromarray(ramp.astype(order)).save(folder / "val/ant/4.tif")
    settings = {"image_size": 32}
    image = found(folder, **settings).val[0]
    expected = np.round(ramp / 65535 * 255)
    assert abs(image.astype(int) - expected[..., None]).max() == 0
    assert len(np.unique(image)) == 256 and image.mean() == pytest.approx(127.5, abs=0.6)


def test_images_of_32_bits_have_no_known_range(folder):
    for mode, numbers in (("F", np.float32), ("I", np.int32)):
        (folder / "val/ant/4.png").unlink(missing_ok=True)
        Image.fromarray(np.full((6, 6), 70000, numbers)).save(folder / "val/ant/4.tif")
        refused(folder, "val/ant/4.tif: cannot be read as an image: its mode " + mode)


def test_a_long_comment_is_not_needed(folder):
    note = PngInfo()
    note.add_text("x", "y" * 2**21, zip=True)
    (folder / "train/ant/0.png").write_bytes(png(0, 0, pnginfo=note))
    with Image.open(folder / "val/ant/4.png") as image:
        np.testing.assert_array_equal(found(folder).val[0], np.asarray(image))


@pytest.mark.parametrize("settings", [{}, {"image_size": 6, "random_resized_crop": True}])
def test_a_picture_that_is_too_large_is_named(folder, settings):
    def chunk(kind, content):
        crc = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + crc

    side = (20_000).to_bytes(4, "big")  # 400 million pixels, in the header alone
    head = chunk(b"IHDR", side + side + bytes([1, 0, 0, 0, 0]))
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (folder / "val/ant/4.png").write_bytes(content)
    refused(folder, "val/ant/4.png: cannot be read as an image: ", "400000000 pixels", **settings)


# ---------------------------------------------------------------- parquet

TRAIN, VAL = [0, 1, 2] * 4, [0, 1, 2] * 2
CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(labels, first=0, image="image", label="label", cell=CELL):
    contents = [png(i % 3, first + i) for i in range(len(labels))]
    cells = contents if cell == pa.binary() else [{"bytes": x, "path": None} for x in contents]
    return pa.table({image: pa.array(cells, cell), label: labels})


def parquet(folder, **tables):
    """Write tables, and say where they are."""
    for name, content in tables.items():
        pq.write_table(content, folder / f"{name}-00000-of-00001.parquet")
    return Data(name=f"parquet:{folder}")


def test_a_test_split_is_validation_only_where_there_is_no_other(tmp_path):
    data = parquet(
        tmp_path, train=table(TRAIN), validation=table(VAL, 50), test=table([-1] * 4, 90)
    )
    images = load(data)
    assert (len(images.train), len(images.val), images.classes) == (12, 6, 3)
    assert size(data) == (12, 6, 3) and images.val_labels.tolist() == VAL
    (tmp_path / "validation-00000-of-00001.parquet").unlink()
    parquet(tmp_path, test=table(VAL[:3], 90))
    assert len(load(data).val) == 3


def test_words_are_classes_in_sorted_order(tmp_path):
    words = [["cat", "ant", "bee"][i] for i in TRAIN], ["bee", "ant"]
    data = parquet(tmp_path, train=table(words[0]), val=table(words[1]))
    images = load(data)
    assert images.classes == 3 and size(data) == (12, 2, 3)
    assert images.train_labels[:3].tolist() == [2, 0, 1] and images.val_labels.tolist() == [1, 0]
    parquet(tmp_path, val=table(["bee", "dog"]))
    with pytest.raises(InputError, match=r"val-\S+ row 1: its label 'dog' is not a class of the"):
        load(data)


def test_images_may_be_plain_binary(tmp_path):
    plain = parquet(
        tmp_path,
        train=table(TRAIN, cell=pa.binary()),
        val=table(VAL, cell=pa.binary()),
    )
    with Image.open(io.BytesIO(png(1, 1))) as image:
        np.testing.assert_array_equal(load(plain).train[1], np.asarray(image))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, None], "row 2: its label is None: expected a class index from 0"),
        ([0, -1, 2], "row 1: its label is -1: expected a class index from 0"),
        (["ant", None], "row 1: its label is None: expected a word"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path, labels, said):
    data = parquet(tmp_path, train=table(labels), val=table(labels[:1]))
    with pytest.raises(InputError, match=rf"train-\S+ {said}"):
        load(data)


def test_columns_of_other_names_are_told_and_can_be_named(tmp_path):
    names = {"image": "img", "label": "fine_label"}
    data = parquet(tmp_path, train=table(TRAIN, **names), test=table(VAL, **names))
    with pytest.raises(InputError, match="has no column image; its columns are img, fine_label: "):
        load(data)
    images = load(data.model_copy(update={"columns": Columns(**names)}))
    assert images.train_labels.tolist() == TRAIN and images.val_labels.tolist() == VAL


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": "share"}, "its column share holds double: expected class indices or words"),
        ({"image": "label"}, "its column label holds int64: expected image files, as bytes"),
    ],
)
def test_columns_of_other_types_are_told(tmp_path, columns, said):
    both = table(TRAIN).append_column("share", pa.array([0.5] * len(TRAIN)))
    data = parquet(tmp_path, train=both, val=both)
    with pytest.raises(InputError, match=said):
        load(data.model_copy(update={"columns": Columns(**columns)}))


@pytest.mark.parametrize("settings", [{}, {"image_size": 6, "random_resized_crop": True}])
def test_a_broken_row_is_named_by_its_file(tmp_path, settings):
    broken = table(VAL).to_pylist()
    broken[2]["image"]["bytes"] = b"no image"
    data = parquet(
        tmp_path,
        train=table(TRAIN),
        validation=pa.Table.from_pylist(broken, table(VAL).schema),
    ).model_copy(update=settings)
    with pytest.raises(InputError, match=r"/validation-\S+ row 2: cannot be read as an image"):
        list(Stream(load(data), data, 0, CPU).val([np.arange(6)]))
    broken[2]["image"]["bytes"] = None
    parquet(tmp_path, validation=pa.Table.from_pylist(broken, table(VAL).schema))
    with pytest.raises(InputError, match=r"/validation-\S+ row 2: has no image$"):
        load(data)


def test_class_indices_have_no_gaps(tmp_path):
    data = parquet(tmp_path, train=table([1, 2, 3, 1]), val=table([1, 2]))
    with pytest.raises(InputError, match="no training image has the label 0, and there are labels"):
        load(data)
    parquet(tmp_path, train=table([0, 1, 1]), val=table([1, 2]))
    with pytest.raises(InputError, match="no training image has the label 2"):
        load(data)


# ---------------------------------------------------------------- other layouts of Hugging Face


def expect_pets(data):
    """The three classes of the folder, in whatever layout."""
    images = load(data)
    assert (len(images.train), len(images.val), images.classes) == (12, 6, 3)
    for pixels, label in zip(images.val, images.val_labels, strict=True):
        assert pixels.reshape(-1, 3).mean(0).argmax() == label  # the brightest channel
    return images


def test_a_folder_of_images(folder):
    data = Data(name=f"hf:{folder}")
    assert expect_pets(data).class_names == CLASSES
    (folder / "train/cat/9.png").write_bytes(png(2, 9))
    assert len(load(data).train) == 13  # the list of files is not that of before


def test_webdataset_shards(tmp_path, folder):
    (tmp_path / "shards").mkdir()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "shards" / f"{split}-000.tar", "w") as shard:
            for c, name in enumerate(CLASSES):
                for file in sorted((folder / split / name).iterdir()):
                    for ending, content in (
                        ("png", file.read_bytes()),
                        ("cls", str(c).encode()),
                    ):
                        entry = tarfile.TarInfo(f"{name}{file.stem}.{ending}")
                        entry.size = len(content)
                        shard.addfile(entry, io.BytesIO(content))
    data = Data(name=f"hf:{tmp_path}/shards", columns=Columns(image="png", label="cls"))
    assert expect_pets(data).class_names == ("0", "1", "2")


@pytest.mark.parametrize("kind", ["one", "several"])
def test_what_save_to_disk_wrote(tmp_path, folder, kind):
    splits = datasets.load_dataset(str(folder))
    if kind == "several":
        splits.save_to_disk(tmp_path / "saved")
        images = expect_pets(Data(name=f"hf:{tmp_path}/saved"))
        assert images.class_names == CLASSES
        (tmp_path / "saved/train/state.json").write_text("{")
        with pytest.raises(InputError, match="cannot be read by Hugging Face datasets"):
            load(Data(name=f"hf:{tmp_path}/saved"))
        return
    splits["train"].save_to_disk(tmp_path / "saved")
    images = load(Data(name=f"hf:{tmp_path}/saved", holdout=3))
    assert (len(images.train), images.val_labels.tolist()) == (9, [0, 1, 2])
    with pytest.raises(InputError, match="expected a split validation or .*, got train: set"):
        load(Data(name=f"hf:{tmp_path}/saved"))


def test_splits_by_name_and_in_part(tmp_path):
    data = parquet(tmp_path, train=table(TRAIN), validation=table(VAL, 50), test=table(VAL, 90))

    def parts(**split):
        images = load(data.model_copy(update={"split": Splits(**split)}))
        return images.train_labels.tolist(), images.val_labels.tolist()

    assert parts(val="test") == parts() == (TRAIN, VAL)
    assert parts(train="train[:75%]", val="train[75%:]") == (TRAIN[:9], TRAIN[9:])
    assert parts(train="train+test") == (TRAIN + VAL, VAL)
    with pytest.raises(InputError, match="has no split 'dev'; its splits are train, valid"):
        parts(val="dev")
    with pytest.raises(InputError, match=r"split 'dev\[:3\]'"):
        parts(val="dev[:3]")


def test_a_dataset_that_is_only_on_the_hub_is_missing(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = r"hf:no/where': not in the cache .* datasets.load_dataset\('no/where', 'small'\)"
    with pytest.raises(MissingError, match=said):
        load(Data(name="hf:no/where", config="small"))


# ---------------------------------------------------------------- silent in the past


def named(labels, names, first=0):
    """A table whose labels are indices of these names, as Hugging Face stores it."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    info = {"info": {"features": datasets.Features(features).to_dict()}}
    found = table(labels, first)
    return found.replace_schema_metadata({"huggingface": json.dumps(info)})


def test_splits_that_name_their_classes_differently_are_refused(tmp_path):
    one, other = ["ant", "bee", "cat"], ["cat", "bee", "ant"]
    data = parquet(tmp_path, train=named(TRAIN, one), val=named(VAL, one, 50))
    assert load(data).class_names == CLASSES
    parquet(tmp_path, val=named(VAL, other, 50))
    with pytest.raises(InputError, match=r"val-\S+: its labels are the classes .*'cat', 'bee'"):
        load(data)
    splits = datasets.DatasetDict()
    for name, names in (("train", one), ("validation", other)):
        splits[name] = datasets.Dataset(named(TRAIN, names)).cast_column(
            "label", datasets.ClassLabel(names=names)
        )
    splits.save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="its splits name their classes differently: "):
        load(Data(name=f"hf:{tmp_path}/saved"))


def test_words_and_numbers_are_not_mixed(tmp_path):
    data = parquet(tmp_path, train=table(TRAIN), train2=table(["ant", "bee"]), val=table(VAL))
    with pytest.raises(InputError, match=r"train2-\S+: its labels are words, and those of "):
        load(data)


def test_only_the_parquet_files_of_a_split_are_read(tmp_path):
    data = parquet(tmp_path, train=table(TRAIN), val=table(VAL, 50))
    for other in ("thumbs/train/x", "thumbs/val/x", "old"):
        (tmp_path / other).mkdir(parents=True)
    for i in range(20):
        (tmp_path / f"thumbs/train/x/{i}.png").write_bytes(png(0, i))
    pq.write_table(table(TRAIN), tmp_path / "old" / "train.parquet")
    assert size(data) == (12, 6, 3)
    parquet(tmp_path, more=table(TRAIN))
    with pytest.raises(InputError, match=r"more-\S+: belongs to no split: expected names that beg"):
        load(data)


def test_a_parquet_file_that_was_edited_in_secret_is_read_again(tmp_path):
    data = parquet(tmp_path, train=table([0, 1, 2]), val=table(VAL, 50))
    file = tmp_path / "train-00000-of-00001.parquet"
    first, before = load(data), file.stat()
    parquet(tmp_path, train=table([0, 2, 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert first.train_labels.tolist() == [0, 1, 2]
    assert load(data).train_labels.tolist() == [0, 2, 1]


def test_images_outside_of_classes_and_broken_links_are_told(folder):
    (folder / "train/loose.png").write_bytes(png(0, 0))
    refused(folder, "train has 1 images outside the folders of its classes, such as loose.png")
    (folder / "train/loose.png").unlink()
    (folder / "train/dog").symlink_to(folder / "unmounted")
    refused(folder, "train/dog: cannot be read: No such file")
    (folder / "train/dog").unlink()
    (folder / "train/cat/part2").symlink_to(folder / "unmounted")
    refused(folder, "train/cat/part2: cannot be read: No such file")
    (folder / "train/cat/part2").unlink()
    os.mkfifo(folder / "train/cat/pipe.png")
    refused(folder, "train/cat/pipe.png: is not a regular file")
    (folder / "train/cat/pipe.png").unlink()
    (folder / "train/cat/loop").symlink_to(folder / "train/cat")
    refused(folder, "cannot be read: Too many levels of symbolic links")


def test_a_test_folder_is_not_used_if_val_is_wrong(folder):
    (folder / "val").rename(folder / "test")
    assert len(found(folder).val) == 6
    (folder / "val").mkdir()
    assert len(found(folder).val) == 6  # an empty folder says nothing
    (folder / "val/1.png").write_bytes(png(0, 1))
    refused(folder, "expected a folder val or validation or test with one folder per class")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"std": [0, 0, 0]}, "std.0 is 0: input should be greater than or equal to 0.000001"),
        ({"mean": [5, 0, 0]}, "mean.0 is 5: input should be less than or equal to 1"),
        ({"pad": 10**9}, "pad is 1000000000: input should be less than"),
        ({"split": {"train": ""}}, "split.train is ''"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        validated(Data, {"name": "hf:x", **settings}, "data")


def test_images_by_relative_paths_or_without_content_are_told(tmp_path):
    for cell, said in (
        ({"bytes": None, "path": "a.png"}, "row 0: its image is the relative path 'a.png'"),
        ({"bytes": None, "path": f"{tmp_path}/a.png"}, "a.png: cannot be read: No such file"),
    ):
        pets = pa.table({"image": [cell] * 3, "label": [0, 1, 2]})
        with pytest.raises(InputError, match=said):
            load(parquet(tmp_path, train=pets, val=pets))


def test_labels_that_are_no_class_indices_are_told(tmp_path):
    data = parquet(tmp_path, train=table([0, 10**12]), val=table([0]))
    with pytest.raises(InputError, match="no training image has the label 1, and there are labels"):
        load(data)
    huge = pa.array([0, 2**64 - 1], pa.uint64())
    parquet(tmp_path, train=table([0, 1]).set_column(1, "label", huge))
    with pytest.raises(InputError, match="train: its column label: Integer value 18446744073709"):
        load(data)
    parquet(tmp_path, train=table([0, 1]), val=table([0]).slice(0, 0))
    with pytest.raises(InputError, match=r"/val-\S+: has no rows"):
        load(data)
