"""`pld-ray data check` and `pld-ray data pack`."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pld_ray.config.parts import Data
from pld_ray.data import datasets


def jpeg(number, width=60, height=40):
    rough = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes with 3 training images and 2 validation images each."""
    for c, name in enumerate(("ant", "bee")):
        for i in range(5):
            file = tmp_path / "pets" / ("train" if i < 3 else "val") / name / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg(10 * c + i))
    return tmp_path / "pets"


def test_a_clean_dataset_is_described(cli, folder):
    done = cli("data", "check", f"folder:{folder}", cwd=folder.parent)
    assert done.returncode == 0 and done.stdout.endswith("No faults found.\n")
    fingerprint = datasets.identify(Data(name=f"folder:{folder}"))
    assert f"2 classes, fingerprint `{fingerprint}`" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("| train"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["train", "JPEG RGB 6", "6", "3, 3, 3", "60", "40"]


def test_everything_that_is_wrong_is_listed_at_once(cli, folder):
    (folder / "train/ant/0.jpg").write_bytes(b"no image")
    (folder / "train/bee/1.jpg").rename(folder / "train/bee/1.heic")
    (folder / "val/cat").mkdir()
    (folder / "val/cat/0.jpg").write_bytes(jpeg(50))
    (folder / "val/bee/8.jpg").write_bytes((folder / "train/bee/0.jpg").read_bytes())
    (folder / "val/bee/9.jpg").write_bytes((folder / "train/ant/2.jpg").read_bytes())
    Image.open(folder / "val/ant/3.jpg").convert("CMYK").save(folder / "val/ant/3.jpg")
    done = cli("data", "check", "folder:pets", cwd=folder.parent)
    assert done.returncode == 1
    errors, warnings = done.stdout.split("Errors:")[1].split("Warnings:")
    assert "train/ant/0.jpg: cannot be read as an image: not an image file" in errors
    assert "train/bee has 1 images that cannot be read, such as 1.heic" in errors
    assert "class 'cat' is in " in errors and errors.count("- ") == 3
    assert "val: JPEG CMYK is converted to RGB with 8 bits per channel (images: 1)" in warnings
    assert "images of val are also in train" in warnings and "(images: 2), such as" in warnings
    assert "images of val are equal to one with another label (images: 1)" in warnings


def test_packed_images_are_smaller_and_nearly_the_same(cli, folder):
    (folder / "train/ant/0.jpg").write_bytes(jpeg(70, 12, 16))
    done = cli(
        "data", "pack", "folder:pets", "--to", "packed", "--shorter", "20", cwd=folder.parent
    )
    assert done.returncode == 0, done.stderr
    assert f'data: {{name: "hf:{folder.parent}/packed"}}' in done.stdout
    settings = {"image_size": 16}
    before = datasets.load(Data(name=f"folder:{folder}", **settings))
    after = datasets.load(Data(name=f"hf:{folder.parent}/packed", **settings))
    assert after.class_names == ("ant", "bee")
    assert (after.train_labels == before.train_labels).all()
    assert np.abs(after.train.astype(int) - before.train).mean() < 2
    stored = datasets.find(Data(name=f"hf:{folder.parent}/packed")).train[0]
    sides = {Image.open(io.BytesIO(stored.read(i))).size for i in range(6)}
    assert sides == {(30, 20), (12, 16)}  # small images stay as they are
    assert stored.read(0) == (folder / "train/ant/0.jpg").read_bytes()
    assert [path.name for path in folder.parent.iterdir()].count("packed") == 1
    again = cli("data", "pack", "folder:pets", "--to", "packed", cwd=folder.parent)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_bad_input_of_the_data_commands_is_one_sentence(cli, folder):
    for arguments, said in (
        (("check", "folder:nowhere"), "nowhere does not exist"),
        (("check", "folder:pets", "--set", "epochs=1"), "expected data.FIELD=VALUE"),
        (("check", "folder:pets", "--set", "data.colour=1"), "data: colour: unknown field"),
        (("pack", "digits", "--to", "x"), "an array of small images"),
    ):
        done = cli("data", *arguments, cwd=folder.parent)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert done.stderr.startswith("pld-ray: ") and done.stderr.count("\n") == 1
    (folder / "train/bee/0.jpg").write_bytes(b"no image")
    done = cli("data", "pack", "folder:pets", "--to", "packed", cwd=folder.parent)
    assert done.returncode == 2 and "train/bee/0.jpg: cannot be read" in done.stderr
    assert sorted(path.name for path in folder.parent.iterdir()) == ["pets"]  # nothing half-written


def test_a_dataset_of_a_plugin(cli, tmp_path):
    plugin = Path(__file__).parents[1] / "examples" / "own_method.py"
    done = cli("data", "check", "noisy_digits", "--plugin", plugin, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "**noisy_digits**: 10 classes, fingerprint `" in done.stdout
    assert "| train | item L 1,437 |  1,437 |" in done.stdout
    missing = cli("plan", "demo", "--plugin", "none.py", cwd=tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.startswith(f"pld-ray: plug-in {tmp_path}/none.py: expected a Python file")
