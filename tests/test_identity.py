"""Data is part of what a trial is: its content, not its path."""

import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pld_ray.config.experiment import load_experiment
from pld_ray.config.parts import Data
from pld_ray.config.planning import plan
from pld_ray.data import datasets, folder_index, subsets
from pld_ray.data.stream import Stream
from pld_ray.errors import InputError, MissingError
from pld_ray.store.store import Store
from pld_ray.sweep.identity import DataIdentity, dataset_entry

CLASSES = ("ant", "bee", "cat")


def write(path, c, i, invert=False):
    """A bitmap of 4x4 pixels: all have the same size in bytes."""
    pixels = np.random.default_rng(100 * c + i).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(255 - pixels if invert else pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three classes with 3 training images and 1 validation image each."""
    for c, name in enumerate(CLASSES):
        for i in range(4):
            split = "train" if i < 3 else "val"
            write(tmp_path / "pets" / split / name / f"{i}.bmp", c, i)
    return tmp_path / "pets"


def fingerprint(folder, kind="folder", **settings):
    return datasets.identify(Data(name=f"{kind}:{folder}", **settings))


def test_moved_data_is_the_same_and_changed_data_is_not(folder, tmp_path):
    first = fingerprint(folder)
    assert len(first) == 16 and fingerprint(folder) == first
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert fingerprint(moved) == first
    write(moved / "train/bee/1.bmp", 1, 1, invert=True)  # the same name and size
    changed = fingerprint(moved)
    assert changed != first
    write(moved / "train/bee/1.bmp", 1, 1)
    assert fingerprint(moved) == first
    shutil.copytree(moved / "train/bee", moved / "train/dog")
    shutil.copytree(moved / "val/bee", moved / "val/dog")
    assert fingerprint(moved) not in (first, changed)
    (folder / "train/ant/0.bmp").rename(folder / "train/ant/a.bmp")  # now the last one
    assert fingerprint(folder) != first


def test_the_same_data_in_other_files_is_the_same(folder, tmp_path):
    (tmp_path / "table").mkdir()
    for split, numbers in (("train", range(3)), ("val", range(3, 4))):
        cells = [
            {"bytes": (folder / split / name / f"{i}.bmp").read_bytes(), "path": None}
            for name in CLASSES
            for i in numbers
        ]
        labels = [name for name in CLASSES for _ in numbers]
        pq.write_table(
            pa.table({"image": cells, "label": labels}), tmp_path / "table" / f"{split}.parquet"
        )
    assert fingerprint(tmp_path / "table", "parquet") == fingerprint(folder)
    assert fingerprint(folder, "hf") == fingerprint(folder)


def test_a_large_set_is_hashed_by_a_sample(folder, monkeypatch):
    from pld_ray.data import fingerprints

    whole = fingerprint(folder)
    monkeypatch.setattr(fingerprints, "WHOLE_BYTES", 100)
    monkeypatch.setattr(fingerprints, "SAMPLED", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "other-cache"))
    some = fingerprint(folder)
    assert some != whole
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "third-cache"))
    reads = []
    monkeypatch.setattr(fingerprints, "_digest", lambda content: reads.append(content) or b"")
    fingerprint(folder)
    assert len(reads) == 4  # two of each split


def test_folders_that_differ_in_nothing_but_pixels_are_not_the_same(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    write(other / "train/bee/1.bmp", 1, 1, invert=True)
    for file in (*folder.rglob("*"), *other.rglob("*")):
        os.utime(file, (10**9, 10**9))  # as some archives are unpacked
    assert fingerprint(folder) != fingerprint(other)
    first = fingerprint(folder)
    write(folder / "val/cat/3.bmp", 2, 3, invert=True)
    os.utime(folder / "val/cat/3.bmp", (10**9, 10**9))
    assert fingerprint(folder) != first


@pytest.mark.parametrize("content", [b"", b"garbage", b"ABC\n", b"\xff\xfe"])
def test_a_damaged_fingerprint_is_computed_again(folder, content, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = fingerprint(folder)
    (kept,) = (tmp_path / "cache/pld-ray/fingerprints").iterdir()
    kept.write_bytes(content)
    assert fingerprint(folder) == first and kept.read_bytes() == first.encode()


def test_renamed_classes_of_saved_data_change_it(folder, tmp_path):
    import datasets as library

    library.load_dataset(str(folder)).save_to_disk(tmp_path / "saved")
    first = fingerprint(tmp_path / "saved", "hf")
    for info in (tmp_path / "saved").glob("*/dataset_info.json"):
        info.write_text(info.read_text().replace('"bee"', '"wasp"'))
    changed = fingerprint(tmp_path / "saved", "hf")
    assert changed != first
    assert fingerprint(shutil.copytree(tmp_path / "saved", tmp_path / "copy"), "hf") == changed


# ---------------------------------------------------------------- the kept list of files


def test_a_list_of_files_is_kept_until_something_changes(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = folder / "train"
    first, _ = folder_index.index_folder(root, "test")
    walked = []
    search = folder_index._search
    monkeypatch.setattr(folder_index, "_search", lambda *args: walked.append(1) or search(*args))
    again, _ = folder_index.index_folder(root, "test")
    assert not walked and again.state == first.state
    assert again.names.tolist() == [f"{c}/{i}.bmp".encode() for c in CLASSES for i in range(3)]
    write(root / "cat/0.bmp", 2, 0, invert=True)
    os.utime(root / "cat/0.bmp", ns=(0, 7))  # the size is the same, the time is not
    assert folder_index.index_folder(root, "test")[0].state != first.state and len(walked) == 1
    write(root / "cat/9.bmp", 2, 9)
    assert len(folder_index.index_folder(root, "test")[0].names) == 10 and len(walked) == 2
    (root / "cat/9.bmp").unlink()
    assert len(folder_index.index_folder(root, "test")[0].names) == 9 and len(walked) == 3
    cached = next((folder_index.cache_folder() / "folders").iterdir())
    cached.write_bytes(b"damaged")
    assert len(folder_index.index_folder(root, "test")[0].names) == 9 and len(walked) == 4


def test_of_a_large_list_some_files_are_compared(folder, monkeypatch):
    monkeypatch.setattr(folder_index, "COMPARED_WHOLE", 2)
    monkeypatch.setattr(folder_index, "COMPARED", 4)
    index, _ = folder_index.index_folder(folder / "train", "test")
    seen = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: seen.append(str(path)) or stat(path))
    assert folder_index._unchanged(index, folder / "train")
    assert len([path for path in seen if path.endswith(".bmp")]) == 4


@pytest.mark.parametrize("where", ["/proc/nowhere", "/dev/null"])
def test_a_folder_without_a_writable_cache_is_read_each_time(folder, monkeypatch, where):
    monkeypatch.setenv("XDG_CACHE_HOME", where)
    assert fingerprint(folder) == fingerprint(folder)


# ---------------------------------------------------------------- trials


TEXT = """
base:
  data: {{name: "{name}", pad: 1}}
  student: resnet8
  teacher: resnet8
  epochs: 1
grid:
  loss: [ce, kd]
"""


@pytest.fixture
def planned(tmp_path):
    """Plan an experiment on a folder, as the command line does."""
    store = Store(tmp_path / "results")

    def planned(name, *overrides):
        file = tmp_path / "pets.yaml"
        file.write_text(TEXT.format(name=name))
        identity = DataIdentity(store)
        found = plan(load_experiment(file, overrides).identified(identity))
        return found, identity.notes

    planned.store = store
    return planned


def test_the_content_is_in_the_id_and_the_path_is_not(folder, planned, tmp_path):
    first, notes = planned(f"folder:{folder}")
    assert notes == []
    for trial in first.trials.values():
        assert trial.data.fingerprint == fingerprint(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    again, _ = planned(f"folder:{moved}")
    assert list(again.trials) == list(first.trials)
    write(moved / "val/ant/3.bmp", 0, 3, invert=True)
    changed, _ = planned(f"folder:{moved}")
    assert not changed.trials.keys() & first.trials.keys()  # the teacher's id has changed too
    assert len(changed.trials) == len(first.trials) == 2


def keep(store, folder):
    data = Data(name=f"folder:{folder}", fingerprint=fingerprint(folder))
    store.keep_dataset(dataset_entry(data, datasets.load(data)))


def test_results_on_earlier_content_are_told(folder, planned):
    keep(planned.store, folder)
    earlier = fingerprint(folder)
    assert planned(f"folder:{folder}")[1] == []
    write(folder / "val/ant/3.bmp", 0, 3, invert=True)
    _, notes = planned(f"folder:{folder}")
    assert len(notes) == 1 and "has changed" in notes[0] and earlier in notes[0]


def test_without_the_data_the_last_content_is_meant(folder, planned):
    name = f"folder:{folder}"
    first, _ = planned(name)
    folder.rename(folder.with_name("gone"))
    unknown, notes = planned(name)
    assert "pets does not exist. Without the data, trials" in notes[0]
    assert not unknown.trials.keys() & first.trials.keys()
    keep(planned.store, folder.with_name("gone"))  # as another machine would, under another path
    assert planned("folder:/data/gone")[0].trials.keys() == first.trials.keys()
    _, notes = planned("folder:/data/gone")
    assert f"fingerprint {next(iter(first.trials.values())).data.fingerprint}" in notes[0]
    with pytest.raises(MissingError):
        datasets.load(Data(name=name))


def test_another_fingerprint_than_the_given_one_is_refused(folder, planned):
    right, wrong = fingerprint(folder), "0" * 16
    assert planned(f"folder:{folder}", f"data.fingerprint='{right}'")[0].trials
    with pytest.raises(InputError, match=f"fingerprint is {right}, and data.fingerprint is 0000"):
        planned(f"folder:{folder}", f"data.fingerprint='{wrong}'")
    assert planned("folder:/nowhere", f"data.fingerprint='{wrong}'")[1] == []


# ---------------------------------------------------------------- paths


def test_a_path_is_relative_to_its_file_and_on_the_command_line_to_the_folder(
    folder, planned, tmp_path, monkeypatch
):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    by_file, _ = planned("folder:pets")
    assert {trial.data.name for trial in by_file.trials.values()} == {f"folder:{folder}"}
    by_hand, _ = planned("folder:pets", "data.name=folder:../pets")
    assert by_hand.trials.keys() == by_file.trials.keys()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PETS", "pets")
    for name in ("folder:~/pets", "folder:$PETS", "folder:${HOME}/pets"):
        assert planned(name)[0].trials.keys() == by_file.trials.keys()


def test_paths_in_grids_recipes_and_teachers_are_absolute(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/cifar.yaml").write_text("data: {name: cifar10, root: copy}\n")
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    file = tmp_path / "many.yaml"
    file.write_text(
        """
recipe: cifar
base: {student: resnet8, loss: kd, epochs: 1}
grid:
  "data.name, teacher":
    - ["folder:a", {name: resnet8, weights: weights.safetensors}]
    - ["folder:b", resnet8]
    - [cifar100, {name: resnet8, train: {data: {name: cifar10, root: other}}}]
"""
    )
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    one, two, three = (cell.trial for cell in plan(load_experiment(file)).cells)
    assert one.data.name == f"folder:{tmp_path}/a" and two.data.name == f"folder:{tmp_path}/b"
    assert one.teacher.weights == f"{tmp_path}/weights.safetensors"
    assert three.teacher.data.root == f"{tmp_path}/other"


def test_a_name_of_the_hub_is_not_a_path(tmp_path, monkeypatch):
    from pld_ray.config.paths import absolute_dataset

    (tmp_path / "mine/birds").mkdir(parents=True)
    assert absolute_dataset("hf:mine/cars", tmp_path) == "hf:mine/cars"
    assert absolute_dataset("hf:mine/birds", tmp_path) == f"hf:{tmp_path}/mine/birds"
    assert absolute_dataset("hf:./mine/cars", tmp_path) == f"hf:{tmp_path}/mine/cars"
    assert absolute_dataset("digits", tmp_path) == "digits"


# ---------------------------------------------------------------- limit and holdout


def test_a_part_has_its_share_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [40, 30, 20, 1])  # sorted by class
    drawn = subsets.draw(labels, 46)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    counts = np.bincount(labels[drawn], minlength=4)
    assert counts[3] == 1 and abs(counts[:3] - np.array([40, 30, 20]) / 2).max() <= 1
    assert set(subsets.draw(labels, 10)) < set(drawn.tolist())
    assert np.bincount(labels[subsets.draw(labels, 4)]).tolist() == [1, 1, 1, 1]
    kept, held = subsets.hold_out(labels, 9)
    assert sorted([*kept, *held]) == list(range(91)) and len(held) == 9
    assert np.bincount(labels[held], minlength=4).tolist() == [4, 3, 2, 0]
    kept, held = subsets.hold_out(labels, 87)  # all but one of each class
    assert np.bincount(labels[kept]).tolist() == [1, 1, 1, 1]
    drawn = subsets.draw(np.zeros(1000, np.int64), 500)
    assert abs((drawn < 500).sum() - 250) < 50  # not the first ones


def test_limit_and_holdout_of_sorted_data(folder):
    images = datasets.load(Data(name=f"folder:{folder}", holdout=3, limit=3))
    assert images.val_labels.tolist() == images.train_labels.tolist() == [0, 1, 2]
    shutil.rmtree(folder / "val")
    alone = datasets.load(Data(name=f"folder:{folder}", holdout=3))
    assert (alone.val == images.val).all() and len(alone.train) == 6
    with pytest.raises(InputError, match="or set data.holdout to validate on training images"):
        datasets.load(Data(name=f"folder:{folder}"))
    with pytest.raises(InputError, match="data.holdout is 7: expected at most 6"):
        datasets.load(Data(name=f"folder:{folder}", holdout=7))


# ---------------------------------------------------------------- on other machines


ENCODED = {"image_size": 4, "random_resized_crop": True}


@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_encoded_images_travel_as_paths(folder, kind):
    images = datasets.load(Data(name=f"{kind}:{folder}", **ENCODED))
    content = pickle.dumps(images)
    again = pickle.loads(content)
    index = np.arange(9)
    assert (again.train.decode(index) == images.train.decode(index)).all()
    assert again.digest == images.digest and b"BM" not in content  # no bitmap is inside
    again.check_visible()


def test_a_machine_that_does_not_see_the_files_says_so(folder):
    images = datasets.load(Data(name=f"folder:{folder}", **ENCODED))
    folder.rename(folder.with_name("gone"))
    with pytest.raises(InputError, match="/pets/train: not on the machine .*: put the data"):
        images.check_visible()
    with pytest.raises(InputError, match=r"/train/ant/0.bmp: cannot be read: No such file"):
        images.train.decode(np.arange(9))


def test_a_file_that_changes_under_a_run_is_refused(folder):
    images = datasets.load(Data(name=f"folder:{folder}", **ENCODED))
    size = (folder / "train/ant/0.bmp").stat().st_size
    with open(folder / "train/ant/0.bmp", "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=f"0.bmp: has {size + 4} bytes, and had {size} when"):
        images.train.decode(np.arange(9))


def test_a_record_says_what_a_student_needs(folder):
    data = Data(name=f"folder:{folder}", fingerprint=fingerprint(folder), limit=3)
    images = datasets.load(data)
    found = datasets.describe(data, images)
    pixels = images.train / 255
    assert found["mean"] == pytest.approx(pixels.mean((0, 1, 2)).tolist())
    assert found["std"] == pytest.approx(pixels.std((0, 1, 2)).tolist())
    assert found | {"mean": 0, "std": 0} == {
        "fingerprint": data.fingerprint,
        "mean": 0,
        "std": 0,
        "class_names": list(CLASSES),
        "channels": 3,
        "image_size": 4,
        "train": 3,
        "val": 3,
    }


def test_a_large_dataset_stays_encoded_with_the_same_pixels(folder, monkeypatch):
    data = Data(name=f"folder:{folder}", image_size=3, flip=True)
    decoded = datasets.load(data)
    monkeypatch.setattr(datasets, "IN_MEMORY", 0)
    encoded = datasets.load(data)
    assert isinstance(decoded.train, np.ndarray) and not isinstance(encoded.train, np.ndarray)
    cpu = torch.device("cpu")
    index = np.arange(9)
    for one, two in zip(
        *(Stream(i, data, 0, cpu).train([index], 1) for i in (decoded, encoded)), strict=True
    ):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert (encoded.train.decode(index) == decoded.train).all()
