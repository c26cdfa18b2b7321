"""What is refused before anything runs: networks, batches and the weights of teachers."""

import collections
import json

import pytest
import torch
from safetensors.torch import save_file
from small import run

from pld_ray.config.parts import Model, Weights
from pld_ray.config.planning import plan
from pld_ray.data import datasets
from pld_ray.distill.running import TrainingError
from pld_ray.distill.teacher import Teacher
from pld_ray.errors import InputError
from pld_ray.losses import REGISTRY
from pld_ray.models.checks import check_loss, check_model
from pld_ray.models.factory import create_model, load_teacher
from pld_ray.store.store import Store
from pld_ray.sweep.checks import check_trials

TEXT = """
base: {data: {name: digits, limit: 64}, student: resnet8, epochs: 1, batch_size: 32, loss: ce}
"""


def refused(experiment, *overrides):
    with pytest.raises(InputError) as error:
        check_trials(plan(experiment(TEXT, *overrides)).trials)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_last_batch_of_one_image_is_refused_if_batch_norm_cannot_use_it(experiment):
    one = "data.limit=65", "student=mobilenetv2_cifar"  # its last maps have one pixel
    said = refused(experiment, *one)
    assert "batch of one image of 8x8 pixels" in said and "set drop_last: true" in said
    assert check_trials(plan(experiment(TEXT, *one, "drop_last=true")).trials).notes == []
    check_trials(plan(experiment(TEXT, *one[1:])).trials)  # 64 = 2 * 32
    check_trials(
        plan(experiment(TEXT, "data.limit=65")).trials
    )  # resnet8 has 2x2 pixels at the end
    said = refused(experiment, "data.limit=66", "student=mobilenetv2_cifar", "workers=2")
    assert "one image per worker" in said


def test_batches_that_are_too_small_are_refused(experiment):
    said = refused(experiment, "drop_last=true", "data.limit=10")
    assert said.startswith("batch_size is 32 and there are 10 training images")
    said = refused(experiment, "workers=4", "data.limit=67")
    assert said.startswith("the last batch of an epoch has 3 samples for 4 workers: set drop_last")


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ("vit_tiny_patch16_224", "'vit_tiny_patch16_224' cannot "),
        (
            "{name: resnet8, args: {num_classes: 5}}",
            "gives 5 logits per image, but the data has 10",
        ),
        ("{name: resnet8, args: {pretrained: true}}", "args.pretrained is not accepted: students"),
        ("{name: resnet50, args: {features_only: true}}", "gives list logits per image"),
        (
            "{name: resnet8, args: {in_chans: 3}}",
            "cannot run on images of 8x8 pixels with 1 channels",
        ),
    ],
)
def test_networks_that_do_not_fit_the_data_are_refused(experiment, student, said):
    assert said in refused(experiment, f"student={student}")


def test_a_tag_means_pretrained_weights_which_students_do_not_have(experiment):
    with pytest.raises(InputError, match="trained from scratch: expected 'resnet18'"):
        plan(experiment(TEXT, "student=resnet18.a1_in1k"))
    with pytest.raises(
        InputError, match=r"resnet18\.no_such_tag.* no such pretrained weights; accepted: "
    ):
        check_model(Weights(name="resnet18.no_such_tag", weights="pretrained"), 1000, 3, 64)


# ---------------------------------------------------------------- weights of teachers


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create_model(Model(name="resnet8"), 10, 1, 8)


def loads(path, network):
    """Whether a file gives the logits of the network; returns what the user is told."""
    teacher = Weights(name="resnet8", weights=str(path))
    notes = check_model(teacher, 10, 1, 8)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(load_teacher(teacher, 10, 1, 8).eval()(x), network.eval()(x))
    return notes


@pytest.mark.parametrize(
    ("wrap", "undone"),
    [
        (lambda state: state, []),
        (lambda state: {"state_dict": state, "epoch": 3}, ["entry 'state_dict'"]),
        (
            lambda state: {"model": {f"module.{name}": x for name, x in state.items()}},
            ["entry 'model'", "prefix 'module.'"],
        ),
        (
            lambda state: {f"_orig_mod.module.{name}": x for name, x in state.items()},
            ["prefix '_orig_mod.'", "prefix 'module.'"],
        ),
        (
            lambda state: {n: x for n, x in state.items() if not n.endswith("batches_tracked")},
            [],
        ),
        (collections.OrderedDict, []),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "pt"])
def test_what_torch_saved_is_read_and_unwrapped(tmp_path, network, wrap, undone, ending):
    path = tmp_path / f"teacher.{ending}"
    torch.save(wrap(network.state_dict()), path)
    notes = loads(path, network)
    assert len(notes) == bool(undone)
    for part in undone:
        assert part in notes[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: (10 * x).to(torch.int8), "has the type torch.int8, and the network torch.float"),
        (lambda x: x.to(torch.complex64), "has the type torch.complex64"),
        (lambda x: x.to_sparse(), "torch.sparse_coo"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "has the type torch.qint8"),
        (lambda x: x.to("meta"), "has no values"),
        (lambda x: x.double() * 1e200, "is not finite"),
    ],
)
def test_weights_of_another_kind_are_refused(tmp_path, network, change, said):
    path = tmp_path / "teacher.pth"
    state = network.state_dict()
    name = "stem.0.weight"
    torch.save(state | {name: change(state[name])}, path)
    with pytest.raises(InputError, match=f"tensor 'stem.0.weight' {said}|{said}"):
        check_model(Weights(name="resnet8", weights=str(path)), 10, 1, 8)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_another_precision_are_those_of_the_file(tmp_path, network, kind):
    path = tmp_path / "TEACHER.PTH"
    state = {
        name: x.to(kind) if x.is_floating_point() else x for name, x in network.state_dict().items()
    }
    torch.save(state, path)
    network.load_state_dict({name: x.to(network.state_dict()[name]) for name, x in state.items()})
    assert loads(path, network) == []


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="holds no tensors"):
        check_model(Weights(name="resnet8", weights=str(tmp_path / "none.safetensors")), 10, 1, 8)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("{weights: WEIGHTS, train: {epochs: 1}}", "teacher.train: only for a teacher to train"),
        ("{weights: ''}", "teacher: weights is ''"),
        ('{weights: "a\\0b"}', "embedded null byte"),
        (f"{{weights: {'a' * 300}}}", "File name too long"),
        ("{weights: /dev/null}", "not a file"),
        ("{weights: WEIGHTS, mean: [0.5], std: [1, 1]}", "mean and std: expected one number each"),
        ("{weights: WEIGHTS, mean: [], std: []}", "mean and std: expected one number each"),
        ("{weights: WEIGHTS, mean: [2], std: [1]}", "teacher: mean.* is 2"),
        (
            "{weights: WEIGHTS, mean: [0, 0], std: [1, 1]}",
            "mean and std have 2 numbers: expected 1",
        ),
        (
            "{args: {checkpoint_path: x.pth}, weights: WEIGHTS}",
            "args.checkpoint_path is not accept",
        ),
        ("{args: {act_layer: foo}, weights: WEIGHTS}", "cannot be made with .*act_layer"),
    ],
)
def test_teachers_that_are_refused(experiment, tmp_path, network, teacher, said):
    torch.save(network.state_dict(), tmp_path / "ok.pth")
    name = "resnet18" if "act_layer" in teacher else "resnet8"
    teacher = teacher.replace("WEIGHTS", str(tmp_path / "ok.pth")).replace(
        "{", f"{{name: {name}, ", 1
    )
    with pytest.raises(InputError, match=said):
        check_trials(plan(experiment(TEXT, f"teacher={teacher}", "loss=kd")).trials)


def test_weights_that_do_not_fit_name_the_first_tensor(tmp_path, network):
    path = tmp_path / "teacher.pth"
    state = network.state_dict()
    first = next(iter(state))

    def said(changed):
        torch.save(changed, path)
        with pytest.raises(InputError) as error:
            check_model(Weights(name="resnet8", weights=str(path)), 10, 1, 8)
        return str(error.value)

    assert f"has no tensor {first!r}; it has " in said(
        {k: x for k, x in state.items() if k != first}
    )
    assert "the network has no tensor 'extra.weight'" in said(
        state | {"extra.weight": torch.ones(1)}
    )
    wide = {name: torch.cat([x, x]) if x.ndim else x for name, x in state.items()}
    assert f"tensor {first!r} has shape (32, 1, 3, 3) in the file and (16, 1, 3, 3)" in said(wide)
    assert f"tensor {first!r} is not finite" in said(state | {first: state[first] * float("nan")})
    assert "holds no state dict: its content is without tensors by name: ['epoch']" in said(
        {"epoch": 1}
    )
    assert "its content is not only tensors: ['note'] are none" in said(state | {"note": "hi"})
    inside = {}
    inside["state_dict"] = inside  # itself, without end
    assert "holds no state dict" in said(inside)
    assert said(network).endswith(
        "cannot be read: it holds more than tensors, or torch.save did not write it; expected a "
        "state dict, as torch.save(model.state_dict(), path) writes it"
    )
    path.write_bytes(b"")
    with pytest.raises(InputError, match="the file is empty"):
        check_model(Weights(name="resnet8", weights=str(path)), 10, 1, 8)
    path.unlink()
    with pytest.raises(InputError, match="every machine must see the file under this path"):
        check_model(Weights(name="resnet8", weights=str(path)), 10, 1, 8)


def test_a_teacher_whose_logits_are_not_finite_fails_before_any_student(
    experiment, tmp_path, network
):
    with torch.no_grad():
        next(network.parameters()).mul_(1e30)
        list(network.parameters())[-2].mul_(1e30)
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    teacher = "teacher={name: resnet8, weights: teacher.safetensors, logits: %s}"
    for logits in ("float32", "live"):
        made = experiment(TEXT)
        made = experiment(
            TEXT, "loss=kd", (teacher % logits).replace("teacher.s", f"{tmp_path}/teacher.s")
        )
        with pytest.raises(TrainingError, match="logits of the teacher resnet8 are not finite"):
            run(plan(made).cells[0].trial, Store(tmp_path / logits))


def test_an_exported_teacher_sees_images_as_it_was_trained(experiment, tmp_path, network):
    """Its config.json has another mean and std: the logits are those on images of that kind."""
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"pretrained_cfg": {"mean": [0.25], "std": [2.0]}}
    (folder / "config.json").write_text(json.dumps(config))
    trials = [
        plan(experiment(TEXT, "loss=kd", f"teacher={{name: resnet8, weights: {path}{more}}}"))
        .cells[0]
        .trial
        for path in (folder, folder / "model.safetensors")
        for more in ("", ", mean: [0.5], std: [1.0]")
    ]
    assert trials[0].id == trials[2].id != trials[1].id == trials[3].id
    images = datasets.load(trials[0].data)
    pixels = torch.from_numpy(images.val[:5]).permute(0, 3, 1, 2) / 255
    ours = (pixels - images.mean[0]) / images.std[0]
    for trial, mean, std in ((trials[0], 0.25, 2.0), (trials[1], 0.5, 1.0)):
        got = Teacher(trial, images, Store(tmp_path / "results"), torch.device("cpu"))(ours)
        torch.testing.assert_close(got, network.eval()((pixels - mean) / std), rtol=1e-4, atol=1e-5)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: expected the config.json of a timm model"):
        plan(experiment(TEXT, "loss=kd", f"teacher={{name: resnet8, weights: {folder}}}"))


def test_the_check_of_a_loss_on_random_logits_does_not_warn(recwarn):
    check_loss(REGISTRY["pld"](name="pld", temperature=8.0), 10)  # the weights are near uniform
    assert not recwarn.list
