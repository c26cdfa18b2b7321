"""Map-style datasets of users: pure functions of (seed, view, row), or refused."""

import random
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pld_ray.config.parts import Data
from pld_ray.config.trial import Trial
from pld_ray.data import audit, datasets, packing
from pld_ray.data.drawn import drawn_split, generators_kept, image_seeds, seed_everything
from pld_ray.data.registry import DATASETS, register_dataset
from pld_ray.data.sampling import random_bits
from pld_ray.data.stream import Stream
from pld_ray.distill.loop import train
from pld_ray.errors import InputError
from pld_ray.store.store import Store
from pld_ray.sweep.checks import check_trials

CPU = torch.device("cpu")


class Squares(torch.utils.data.Dataset):
    """Images of 6x6 pixels; `change` maps an array [6, 6, 3] to an image."""

    classes = ("x", "y", "z")

    def __init__(self, count, change=None):
        self.targets = [row % 3 for row in range(count)]
        self.change = change or (lambda image: image)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        if row >= len(self):
            raise IndexError(row)
        image = np.full((6, 6, 3), 40 * (row % 3) + row % 100, np.uint8)
        return self.change(image), self.targets[row]


def noisy(image):
    """Draw from all three generators."""
    drawn = torch.randint(20, (1,)).item() + np.random.randint(20) + random.randrange(20)
    return image + np.uint8(drawn)


def expected(change, row, seed, view):
    """The image of a row, from the definition: all generators seeded, then the transform."""
    bits = int(random_bits(seed, view, np.array([row]), "own")[0])
    torch.manual_seed(bits >> 1)
    np.random.seed(bits & 0xFFFFFFFF)
    random.seed(bits)
    return torch.from_numpy(np.ascontiguousarray(change(Squares(99)[row][0])))


@pytest.fixture
def own(request):
    """Register datasets under the name "own_squares" for this test."""

    def register(train, val=None):
        DATASETS.pop("own_squares", None)
        register_dataset("own_squares")(lambda data, path: (train, val))
        return Data

    yield register
    DATASETS.pop("own_squares", None)


def data(**settings):
    return Data(name="own_squares", **settings)


def batches(images, settings, view, shares, seed=5):
    stream = Stream(images, settings, seed, CPU)
    return list(stream.train([np.array(s) for s in shares], view))


def test_an_image_is_a_function_of_seed_view_and_row(own):
    own(Squares(30, noisy), Squares(12))
    settings = data(augment="own", mean=(0, 0, 0), std=(1, 1, 1))
    images = datasets.load(settings)
    assert images.class_names == ("x", "y", "z") and images.shape == (3, 3, 6)
    state = torch.get_rng_state()
    seen = batches(images, settings, 2, [[7, 1], [29, 1, 3]])
    assert torch.equal(torch.get_rng_state(), state)  # that of the training
    for index, (x, labels) in zip([[7, 1], [29, 1, 3]], seen, strict=True):
        assert labels.tolist() == [row % 3 for row in index]
        for image, row in zip(x, index, strict=True):
            want = expected(noisy, row, 5, 2).permute(2, 0, 1) / 255
            torch.testing.assert_close(image, want)
    other = batches(images, settings, 3, [[7, 1]])[0][0]
    assert not torch.equal(other, seen[0][0])
    (val,) = Stream(images, settings, 5, CPU).val([np.array([4, 2])])
    for image, row in zip(val, [4, 2], strict=True):
        torch.testing.assert_close(image, expected(np.copy, row, 0, 0).permute(2, 0, 1) / 255)


def test_our_augmentation_comes_on_top(own):
    own(Squares(30, noisy), Squares(12))
    settings = data(augment=["own", "random_erasing"], flip=True, pad=1)
    images = datasets.load(settings)
    one, two = (batches(images, settings, 1, [[3, 4, 5]])[0][0] for _ in range(2))
    assert torch.equal(one, two)
    split = batches(images, settings, 1, [[5], [3], [4]])
    assert torch.equal(torch.cat([x for x, _ in split]), one[[2, 0, 1]])
    mixing = data(augment="own", mixup=0.5)
    mixed = batches(datasets.load(mixing), mixing, 0, [[3, 4]])[0]
    assert mixed[0].shape == (2, 3, 6, 6) and mixed[1].share.shape == (2,)


def test_limit_and_statistics(own):
    own(Squares(30), Squares(12))
    images = datasets.load(data(limit=9))
    assert len(images.train) == 9 and len(images.val) == 12
    assert np.bincount(images.train_labels).tolist() == [3, 3, 3]
    rows = images.train.rows
    values = np.concatenate([Squares(30)[row][0].reshape(-1, 3) for row in rows]) / 255
    assert images.mean == pytest.approx(values.mean(0)) and images.std == pytest.approx(
        values.std(0)
    )
    held = datasets.load(data(holdout=6))
    assert len(held.train) == 24 and len(held.val) == 6
    assert not set(held.train.rows) & set(held.val.rows)


@pytest.mark.parametrize(
    "change",
    [
        Image.fromarray,
        lambda image: torch.from_numpy(image).permute(2, 0, 1),
        lambda image: np.copy(image),
        lambda image: Image.fromarray(image).convert("RGBA"),
    ],
)
def test_kinds_of_images(own, change):
    own(Squares(30, change), Squares(12, change))
    images = datasets.load(data(mean=(0, 0, 0), std=(1, 1, 1)))
    ((x, _),) = batches(images, data(), 0, [[8]])
    assert x.unique().item() == pytest.approx((40 * 2 + 8) / 255)


def test_floats_are_used_as_they_are(own):
    def normalised(image):
        return torch.from_numpy(image).permute(2, 0, 1).double() / 100 - 1

    own(Squares(30, normalised), Squares(12, normalised))
    with pytest.raises(InputError, match="values from -1 to 0.09: set data.mean and data.std"):
        datasets.load(data())
    images = datasets.load(data(mean=(0,) * 3, std=(1,) * 3))
    ((x, _),) = batches(images, data(), 0, [[8]])
    assert x.dtype == torch.float32 and x.unique().item() == pytest.approx(88 / 100 - 1)
    said = datasets.load(data(mean=(0.4,) * 3, std=(0.2,) * 3))  # what its transform has done
    assert said.mean == (0.4,) * 3
    ((again, _),) = batches(said, data(mean=(0.4,) * 3, std=(0.2,) * 3), 0, [[8]])
    assert torch.equal(again, x)
    for field in ("pad", "flip", "augment"):
        value = {"pad": 1, "flip": True, "augment": "random_erasing"}[field]
        with pytest.raises(InputError, match=rf"data\.{field}: .* gives floating-point images"):
            datasets.load(data(**{field: value}))


def seldom(image):
    """Change one image in a million."""
    return image if random.random() > 1e-6 else image + np.uint8(1)


class Few(Squares):
    classes = ("x", "y", "z", "none")


GENERATOR = np.random.default_rng(0)


class Counting(Squares):
    def __getitem__(self, row):
        self.drawn = getattr(self, "drawn", 0) + 1
        return super().__getitem__(row)[0] + np.uint8(self.drawn), row % 3


class Lying(Squares):
    def __getitem__(self, row):
        return super().__getitem__(row)[0], (row + 1) % 3


class Labelled(Squares):
    def __init__(self, row, label):
        super().__init__(30)
        self.targets[row] = label


class Named(Squares):
    def __init__(self, classes):
        super().__init__(30)
        self.classes = classes


class Failing(Squares):
    def __getitem__(self, row):
        if row == 17:
            raise OSError("no such file\nand more")
        return super().__getitem__(row)


@pytest.mark.parametrize(
    ("train", "settings", "said"),
    [
        (
            Squares(30, lambda image: image + np.uint8(GENERATOR.integers(100))),
            {"augment": "own"},
            r"train: image \d+ differs when it is drawn twice with the same seeds",
        ),
        (Counting(30), {}, "image 29 differs when it is drawn twice"),
        (Lying(30), {}, "train: item 0 has the label 1, and the targets of the dataset say 0"),
        (Squares(30, noisy), {}, "its images are random: set data.augment to own"),
        (Squares(30, seldom), {}, "its images are random: set data.augment to own"),
        (Few(4), {}, "no training image has the label 3: expected images of all 4 classes"),
        (
            Squares(30, lambda image: Image.new("I;16", (6, 6))),
            {},
            "has the mode I;16, more than 8 bits per channel: expected L or RGB",
        ),
        (
            Squares(30, noisy),
            {"augment": "own", "holdout": 5},
            "take random numbers, and validation images must not: expected no data.holdout",
        ),
        (Squares(0), {}, "its train split has no images"),
        (Squares(30, lambda image: image[:, :4]), {}, "has 4x6 pixels: expected a square"),
        (Squares(30, lambda image: image.astype(np.int64)), {}, r"is int64 \[6, 6, 3\]: expected"),
        (Squares(30, lambda image: "image"), {}, r"is <class 'str'>: expected an image of Pillow"),
        (Squares(30, lambda image: torch.full((3, 6, 6), torch.nan)), {}, "not finite"),
        (Squares(30), {"image_size": 8}, "data.image_size is 8: own_squares gives images of 6"),
        (
            Squares(30, lambda image: image[..., [0] * 5]),
            {"augment": "color_jitter", "holdout": 3},
            "data.augment is color_jitter: the images of own_squares have 5 channels: expected",
        ),
        (iter([1]), {}, "has no length: expected a map-style dataset"),
        (Squares(30, lambda image: image[:, :, :0]), {}, r"is empty: .* \[6, 6, 0\]"),
        (
            Squares(30, lambda image: torch.ones(3, 6, 6).to_sparse()),
            {},
            "expected .* a dense tensor",
        ),
        (Squares(30, lambda image: torch.ones(3, 6, 6, device="meta")), {}, "a dense tensor"),
        (
            Labelled(5, 2**40),
            {},
            "item 5 has the label 1099511627776: expected a class index from 0",
        ),
        (Labelled(5, -1), {}, "item 5 has the label -1: expected a class index from 0"),
        (
            torch.utils.data.Subset(Squares(9), [0, 1, 500]),
            {},
            "labels of its images cannot be found",
        ),
        (Named({"x", "y", "z"}), {}, "its classes are {.*}: expected a list of names"),
        (Named(3), {}, "its classes are 3: expected a list of names"),
        (Named("xyz"), {}, "its classes are 'xyz': expected a list of names"),
        ([1, 2, 3], {}, "train: item 0 is a int: expected an image and its label"),
    ],
)
def test_what_is_refused(own, train, settings, said):
    own(train, Squares(12))
    with pytest.raises(InputError, match=said):
        datasets.load(data(**settings))


def test_class_names_may_be_an_array(own):
    own(Named(np.array(["a", "b", "c"])), Squares(12))
    assert datasets.load(data()).class_names == ("a", "b", "c")


def test_a_random_validation_dataset_is_refused(own):
    own(Squares(30), Squares(12, noisy))
    with pytest.raises(
        InputError, match="val: its images take random numbers, and validation images must"
    ):
        datasets.load(data())


def test_a_dataset_without_validation(own):
    own(Squares(30), None)
    with pytest.raises(InputError, match="it has no validation split: set data.holdout"):
        datasets.load(data())
    assert len(datasets.load(data(holdout=6)).val) == 6


def test_errors_while_images_are_drawn(own):
    own(Failing(30), Squares(12))
    settings = data(mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(InputError) as error:
        images = datasets.load(settings)
        batches(images, settings, 0, [[1, 2], [17]])
    assert str(error.value) == "data 'own_squares', train: image 17: OSError: no such file"
    smaller = Squares(30, lambda image: image[1:, 1:] if image[0, 0, 0] == 97 else image)  # 17
    own(smaller, Squares(12))
    with pytest.raises(InputError, match=r"image 17 is torch.uint8 \[5, 5, 3\], and the first is"):
        images = datasets.load(settings)
        batches(images, settings, 0, [[17]])


def test_labels_come_from_wherever_they_are(own):
    tensors = torch.utils.data.TensorDataset(
        torch.arange(30)[:, None, None, None].expand(30, 1, 4, 4).to(torch.uint8),
        torch.arange(30) % 3,
    )
    own(torch.utils.data.Subset(tensors, range(29, 5, -1)), tensors)
    images = datasets.load(data())
    assert images.train_labels.tolist() == [row % 3 for row in range(29, 5, -1)]
    assert images.class_names == ("0", "1", "2")

    class Bare:  # neither targets nor labels: every item is drawn
        def __len__(self):
            return 6

        def __getitem__(self, row):
            return torch.zeros(1, 4, 4, dtype=torch.uint8), torch.tensor(row // 2)

    own(Bare(), Bare())
    assert datasets.load(data()).train_labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_fingerprint_is_of_what_it_holds(own):
    def fingerprint(train):
        own(train, Squares(12))
        return datasets.identify(data(augment="own"))

    first = fingerprint(Squares(30, noisy))
    assert first == fingerprint(Squares(30, noisy))
    brighter = fingerprint(Squares(30, lambda image: noisy(image) + np.uint8(1)))
    assert len({first, brighter, fingerprint(Squares(31, noisy))}) == 3


def test_generators_are_kept():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    with generators_kept():
        seed_everything(123)
    found = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    assert found == (torch.rand(1).item(), np.random.rand(), random.random())


def test_check_and_pack(own):
    own(Failing(30), Squares(12))
    found = datasets.find(data())
    report = audit.audit(found)
    assert report.faults == ["data 'own_squares', train: image 17: OSError: no such file"]
    assert report.splits["train"][1].tolist() == [10, 10, 10]
    with pytest.raises(InputError, match="data pack: the dataset draws its images"):
        packing.pack(found, "packed", 4, 90)


def test_the_bank_and_a_live_teacher_give_the_same_bits(own, tmp_path):
    own(Squares(30, noisy), Squares(12))
    text = {"data": data(augment="own"), "student": "resnet8", "epochs": 3, "batch_size": 10}
    teacher = Trial(**text | {"epochs": 1, "loss": "ce"})
    store, weights = Store(tmp_path), []
    images = datasets.load(data(augment="own"))
    train(teacher, images, store, lambda metrics: None)
    for logits in ("float32", "live"):
        trial = Trial(**text, loss="kd", teacher=teacher, teacher_logits=logits)
        train(trial, images, store, lambda metrics: None)
        weights.append(zlib.crc32(store.weights(trial)))
    assert weights[0] == weights[1]


def test_trials_that_share_a_dataset_are_checked_each(own):
    text = {"student": "resnet8", "loss": "ce", "epochs": 1}
    settings = data(augment="own"), data()
    own(Squares(30, noisy), Squares(12))
    with pytest.raises(InputError, match="its images are random: set data.augment to own"):
        check_trials({str(i): Trial(data=d, **text) for i, d in enumerate(settings)})
    digits = [Data(name="digits", augment=names) for names in ((), ("own",))]
    with pytest.raises(InputError, match="data.augment is own: digits has no transform of its own"):
        check_trials({str(i): Trial(data=d, **text) for i, d in enumerate(digits)})


def test_what_is_random_in_few_images_is_refused_when_it_is_drawn(own):
    """The eight images that are tried are rows 0, 4, 8, 12, 16, 20, 24 and 29."""

    def change(image):
        return noisy(image) if image[0, 0, 0] == 17 + 80 else image

    own(Squares(30, change), Squares(12))
    settings = data(mean=(0,) * 3, std=(1,) * 3)
    images = Squares(30, change)
    split, _ = drawn_split(settings, images, "train")
    assert not split.random
    assert torch.equal(split.draw(np.array([1, 2]), 0, 0), split.draw(np.array([1, 2]), 3, 4))
    with pytest.raises(InputError, match="image 17 takes random numbers, and the first ones do"):
        split.draw(np.array([2, 17]), 0, 0)
    said = data(augment="own", mean=(0,) * 3, std=(1,) * 3)
    with pytest.raises(InputError, match="image 17 takes random numbers"):
        datasets.load(said)


class RandomLabels(Squares):
    def __getitem__(self, row):
        label = self.targets[row] if random.random() < 0.6 else random.randrange(3)
        return super().__getitem__(row)[0], label


def test_random_labels_are_refused(own):
    own(RandomLabels(300), Squares(12))
    with pytest.raises(InputError, match=r"item \d+ has the label \d, and the targets of the dat"):
        datasets.load(data(augment="own"))


def test_a_label_is_an_index(own):
    class Words(Squares):
        def __getitem__(self, row):
            return super().__getitem__(row)[0], "x"

    own(Words(30), Squares(12))
    with pytest.raises(InputError, match="item 0 has the label 'x': expected a class index"):
        datasets.load(data())


def test_both_splits_are_of_one_kind(own):
    own(Squares(30), Squares(12, lambda image: torch.from_numpy(image).permute(2, 0, 1) / 255))
    with pytest.raises(InputError, match="train images are uint8 and val images floating-point"):
        datasets.load(data())


def test_two_datasets_of_the_same_images_are_two(own):
    found = []
    for name in ("own_squares", "own_squares_too"):
        register_dataset(name)(lambda d, path: (Squares(30), Squares(12)))
        found.append(datasets.identify(Data(name=name)))
    del DATASETS["own_squares_too"]
    assert found[0] != found[1]


def test_the_function_does_not_see_what_trials_share(own):
    seen = []
    own(None)
    DATASETS.pop("own_squares")
    register_dataset("own_squares")(lambda d, path: seen.append(d) or (Squares(30), Squares(12)))
    datasets.load(data(augment="random_erasing", flip=True, pad=1, mixup=0.5, limit=9))
    assert {(d.augment, d.flip, d.pad, d.mixup, d.limit) for d in seen} == {((), False, 0, None, 9)}


def test_its_own_numbers_are_not_those_of_further_transforms():
    index = np.arange(50)
    seeds = [image_seeds(1, 2, index, purpose) for purpose in ("own", "library")]
    assert not set(seeds[0]) & set(seeds[1])
