import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pld_ray.config.parts import Data
from pld_ray.data.augmentation import crop_and_flip
from pld_ray.data.datasets import load, size
from pld_ray.data.images import Images, Size
from pld_ray.data.sampling import batches, order, random_bits
from pld_ray.data.stream import Stream
from pld_ray.errors import InputError

CPU = torch.device("cpu")


def random_images(size=50, side=6, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, side, side, channels), dtype=np.uint8)
    labels = rng.integers(0, 4, size)
    return Images(images, labels, images[:9], labels[:9], 4, (0.5,) * channels, (0.25,) * channels)


def test_hashes_are_splitmix64():
    # the first outputs of the reference generator seeded with 0 (Vigna, splitmix64.c)
    from pld_ray.data.sampling import _mix

    golden = 0x9E3779B97F4A7C15
    states = np.array([0, golden], dtype=np.uint64)
    assert _mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_the_order_is_a_permutation_that_seed_and_epoch_decide():
    one = order(0, 0, 1000)
    assert sorted(one.tolist()) == list(range(1000))
    assert (one == order(0, 0, 1000)).all()
    assert (one != order(0, 1, 1000)).mean() > 0.98
    assert (one != order(1, 0, 1000)).mean() > 0.98


def test_random_bits_are_uniform_and_independent_across_keys():
    index = np.arange(20000)
    offset = random_bits(3, 5, index, "augment") % np.uint64(9)
    counts = np.bincount(offset.astype(int), minlength=9)
    expected = len(index) / 9
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # chi2(8), p = 0.001
    other = random_bits(3, 6, index, "augment") % np.uint64(9)
    assert abs(np.corrcoef(offset.astype(float), other.astype(float))[0, 1]) < 0.03


def test_batches_cover_the_order_and_drop_the_last_when_asked():
    index = np.arange(10)
    assert [len(b) for b in batches(index, 4, False)] == [4, 4, 2]
    assert [len(b) for b in batches(index, 4, True)] == [4, 4]
    assert np.concatenate(list(batches(index, 4, False))).tolist() == list(range(10))


def test_crop_and_flip_against_a_loop():
    images = torch.from_numpy(random_images(5).train)
    top, left, flip = (torch.tensor(x) for x in ([0, 1, 2, 4, 3], [4, 3, 2, 1, 0], [0, 1, 0, 1, 1]))
    got = crop_and_flip(images, 2, top, left, flip)
    for i in range(5):
        padded = np.zeros((10, 10, 3), np.uint8)
        padded[2:8, 2:8] = images[i].numpy()
        crop = padded[top[i] : top[i] + 6, left[i] : left[i] + 6]
        expected = crop[:, ::-1] if flip[i] else crop
        np.testing.assert_array_equal(got[i].numpy(), expected)


def test_a_sample_looks_the_same_in_any_batch():
    images, data = random_images(), Data(name="x", pad=2, flip=True)
    stream = Stream(images, data, seed=7, device=CPU)
    index = order(7, 3, 50)
    whole, labels = next(stream.train([index], 3))
    shares = list(stream.train([index[rank::4] for rank in range(4)], 3))
    for rank, (x, y) in enumerate(shares):
        assert torch.equal(x, whole[rank::4]) and torch.equal(y, labels[rank::4])
    assert not torch.equal(next(stream.train([index], 4))[0], whole)
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_normalisation():
    images = random_images()
    stream = Stream(images, Data(name="x"), 0, CPU)
    x, labels = next(stream.train([np.arange(50)], 0))
    expected = (images.train / 255 - 0.5) / 0.25
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)
    assert labels.tolist() == images.train_labels.tolist()
    np.testing.assert_allclose(next(stream.val([np.arange(9)])).numpy(), x[:9].numpy())


def test_digits():
    digits = load(Data(name="digits"))
    assert digits.shape == (10, 1, 8)
    assert len(digits.train) == 1437 and len(digits.val) == 360
    pixels = digits.train / 255
    assert digits.mean[0] == pytest.approx(pixels.mean()) and digits.std[0] == pytest.approx(
        pixels.std()
    )
    assert len(load(Data(name="digits", limit=100)).train) == 100
    assert load(Data(name="digits", image_size=16)).shape == (10, 1, 16)


def png(rng, side=5):
    array = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return array, buffer.getvalue()


def test_folder(tmp_path):
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 3), ("test", 2)):
        for c in ("cat", "dog"):
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(count):
                array, content = png(rng)
                (tmp_path / split / c / f"{i}.png").write_bytes(content)
                arrays.setdefault((split, c), []).append(array)
    found = load(Data(name=f"folder:{tmp_path}"))
    assert found.shape == (2, 3, 5) and len(found.train) == 6 and len(found.val) == 4
    assert size(Data(name=f"folder:{tmp_path}")) == (6, 4, 2)
    np.testing.assert_array_equal(found.val[:2], arrays["test", "cat"])
    assert found.val_labels.tolist() == [0, 0, 1, 1]
    for image, label in zip(found.train, found.train_labels, strict=True):
        assert any((image == a).all() for a in arrays["train", ("cat", "dog")[label]])
    (tmp_path / "train" / "cat" / "0.png").write_bytes(png(rng, side=9)[1])
    with pytest.raises(InputError, match="set data.image_size"):
        load(Data(name=f"folder:{tmp_path}"))
    assert load(Data(name=f"folder:{tmp_path}", image_size=4)).shape == (2, 3, 4)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="0.png: cannot be read as an image"):
        load(Data(name=f"folder:{tmp_path}"))


def test_parquet(tmp_path):
    rng = np.random.default_rng(0)
    made = [png(rng) for _ in range(4)]
    rows = [{"bytes": content, "path": None} for _, content in made]
    table = pa.table({"image": rows, "label": [1, 0, 2, 1]})
    pq.write_table(table, tmp_path / "train-0.parquet")
    pq.write_table(table.slice(0, 2), tmp_path / "validation-0.parquet")
    found = load(Data(name=f"parquet:{tmp_path}"))
    assert found.shape == (3, 3, 5) and found.train_labels.tolist() == [1, 0, 2, 1]
    assert size(Data(name=f"parquet:{tmp_path}", limit=3)) == (3, 2, 3)
    np.testing.assert_array_equal(found.train, [array for array, _ in made])
    with pytest.raises(InputError, match="nowhere does not exist"):
        load(Data(name=f"parquet:{tmp_path}/nowhere"))
    (tmp_path / "train-0.parquet").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"train-0.parquet: cannot be read as parquet: "):
        load(Data(name=f"parquet:{tmp_path}"))


def test_cifar10_from_an_existing_copy(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    rng = np.random.default_rng(0)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    planes = {}
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        planes[name] = rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
        entry = {"data": planes[name].reshape(2, -1), "labels": [3, 9]}
        (folder / name).write_bytes(pickle.dumps(entry))
    found = load(Data(name="cifar10", root=str(tmp_path)))
    assert found.shape == (10, 3, 32) and len(found.train) == 10
    np.testing.assert_array_equal(found.val, planes["test_batch"].transpose(0, 2, 3, 1))


def test_bad_names_and_places_are_told():
    with pytest.raises(InputError, match="did you mean 'digits'"):
        load(Data(name="digit"))
    with pytest.raises(InputError, match="the folder /nowhere does not exist"):
        load(Data(name="folder:/nowhere"))
    with pytest.raises(InputError, match="set data.root"):
        load(Data(name="cifar100", root="/nowhere"))
    with pytest.raises(InputError, match=r"data.mean is \(0.5, 0.5\): expected 1 numbers"):
        load(Data(name="digits", mean=(0.5, 0.5)))


def test_sizes_are_those_of_the_loaded_data():
    for limit in (None, 9):
        data = Data(name="digits", limit=limit)
        images = load(data)
        assert size(data) == Size(len(images.train), len(images.val), images.classes)
