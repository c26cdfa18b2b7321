"""SimKD: the projected map against loops, and the trained student wherever it is loaded again."""

import copy
import shutil

import numpy as np
import pytest
import timm
import torch
from small import run, weights
from torch import nn

from analysis.landscapes import weights as landscapes
from pld_ray import reuse_classifier, save
from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.data.stream import Stream
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.loop import train, train_gang
from pld_ray.errors import InputError
from pld_ray.losses import ATLoss, KDLoss, SimKDLoss
from pld_ray.models.checks import check_features
from pld_ray.models.export import export_student, load_student
from pld_ray.models.factory import create_student
from pld_ray.models.features import WithFeatures
from pld_ray.models.reused import ReusedClassifier
from pld_ray.store.store import Store
from pld_ray.sweep.checks import check_trials

CPU = torch.device("cpu")


def convolved(x, weight):
    """A convolution that keeps the size: [B, c, h, w] and [o, c, k, k] to [B, o, h, w]."""
    pad = weight.shape[2] // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    h, w = x.shape[2] - 2 * pad, x.shape[3] - 2 * pad
    out = np.zeros((len(x), len(weight), h, w))
    for b, c, i, j in np.ndindex(*out.shape):
        window = x[b, :, i : i + 2 * pad + 1, j : j + 2 * pad + 1]
        out[b, c, i, j] = (weight[c] * window).sum()
    return out


def blocks(x, size):
    """Means of blocks: [B, c, h, w] to [B, c, size, size]."""
    side = x.shape[2] // size
    return x.reshape(*x.shape[:2], size, side, size, side).mean((3, 5))


def projected(x, projector):
    """Three convolutions, each normalised by the batch and cut at 0."""
    for i in (0, 3, 6):
        x = convolved(x, projector[i].weight.detach().numpy())
        mean, variance = (f(x, (0, 2, 3), keepdims=True) for f in (np.mean, np.var))
        gain, shift = (p.detach().numpy()[:, None, None] for p in projector[i + 1].parameters())
        x = np.maximum((x - mean) / np.sqrt(variance + 1e-5) * gain + shift, 0)
    return x


@pytest.mark.parametrize(
    ("student", "teacher", "factor", "sizes"),
    [
        ("resnet8", "resnet14", 2, (4, 4)),
        ("wrn_16_1", "resnet8x4", 4, (4, 4)),
        ("resnet8", "mobilenetv2_cifar", 8, (4, 1)),  # the student's map is larger
        ("mobilenetv2_cifar", "resnet8", 1, (1, 4)),  # the teacher's map is larger
    ],
)
def test_the_loss_and_the_logits_against_loops(student, teacher, factor, sizes):
    torch.manual_seed(0)
    networks = [timm.create_model(name, num_classes=5).double() for name in (student, teacher)]
    x, y = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.arange(3)
    made = reuse_classifier(*networks, x, factor=factor).double()
    for norm in made.projector[1::3]:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    made.network.eval()
    teacher_network = networks[1].eval()
    with torch.no_grad():
        maps = [n.forward_features(x).numpy() for n in (made.network, teacher_network)]
    assert tuple(m.shape[2] for m in maps) == sizes
    ours, theirs = (blocks(m, min(sizes)) for m in maps)
    ours = projected(ours, made.projector)
    expected = ((ours - theirs) ** 2).mean()
    layer = [p.detach().numpy() for p in teacher_network.get_classifier().parameters()]
    logits = ours.mean((2, 3)) @ layer[0].T + layer[1]

    found, features = WithFeatures(made, frozenset(["last"]))(x)
    np.testing.assert_allclose(features.further["last"][0].detach().numpy(), ours, atol=1e-9)
    np.testing.assert_allclose(found.detach().numpy(), logits, atol=1e-9)
    np.testing.assert_allclose(made(x).detach().numpy(), logits, atol=1e-9)

    distiller = Distiller(made, teacher_network, SimKDLoss(weight=3.0, factor=factor))
    distiller.connect(x)
    made.network.eval()
    assert distiller.learnt_by_loss() == []  # the projector is the student's
    value = distiller(x, y)
    assert value.item() == pytest.approx(3 * expected, rel=1e-5)  # the loss is float32
    value.backward()
    without = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["classifier.weight", "classifier.bias"]


def test_cross_entropy_is_that_of_the_reused_classifier():
    torch.manual_seed(0)
    networks = [timm.create_model("resnet8", num_classes=5) for _ in range(2)]
    x, y = torch.randn(3, 3, 16, 16), torch.arange(3)
    made = reuse_classifier(*networks, x)
    distiller = Distiller(made, networks[1], SimKDLoss(weight=0, ce_weight=0.5))
    distiller.connect(x)
    expected = nn.functional.cross_entropy(made(x), y) / 2
    assert distiller(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_parameters_by_hand():
    resnet20, resnet56 = (timm.create_model(f"resnet{n}", num_classes=100) for n in (20, 56))
    body = 278_324 - 64 * 100 - 100
    made = reuse_classifier(resnet20, resnet56, torch.randn(1, 3, 32, 32))
    projector = 64 * 32 + 9 * 32 * 32 + 32 * 64 + 2 * (32 + 32 + 64)
    classifier = 64 * 100 + 100
    counts = [sum(p.numel() for p in part.parameters()) for part in made.children()]
    assert counts == [body, projector, 0, classifier]
    assert sum(counts) == 278_324 + projector
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert trained == body + projector
    half = reuse_classifier(
        timm.create_model("resnet20"), resnet56, torch.randn(1, 3, 32, 32), factor=4
    )
    few = 64 * 16 + 9 * 16 * 16 + 16 * 64 + 2 * (16 + 16 + 64)
    assert sum(p.numel() for p in half.projector.parameters()) == few


def test_what_cannot_work_is_told():
    def make(student, teacher, **settings):
        return reuse_classifier(student, teacher, torch.randn(1, 3, 32, 32), **settings)

    def network(name, classes=10, **args):
        return timm.create_model(name, num_classes=classes, **args)

    said = "simkd needs networks that end with average pooling and a linear layer, as {} does not"
    vit = network("vit_tiny_patch16_224", img_size=32)
    for pair in ((vit, network("resnet8")), (network("resnet8"), vit)):
        with pytest.raises(InputError, match=said.format("vit_tiny_patch16_224")):
            make(*pair)
    with pytest.raises(InputError, match=said.format("resnet18")):
        make(network("resnet8"), network("resnet18", global_pool="max"))
    with pytest.raises(InputError, match="factor is 65: expected at most the 64 channels"):
        make(network("resnet8"), network("resnet8"), factor=65)
    plain = network("resnet8"), network("resnet8")
    with pytest.raises(ValueError, match=r"SimKDLoss: .* expected reuse_classifier\(student, "):
        Distiller(*plain, SimKDLoss())
    made = make(network("resnet8"), network("resnet8"))
    with pytest.raises(InputError, match="the teacher has 7 classes, but the student has 10"):
        made.copy_classifier(network("resnet8", classes=7))


def test_the_classifier_must_be_that_of_the_teacher():
    teacher, other, student, wide = (
        timm.create_model(name, num_classes=10) for name in ("resnet8",) * 3 + ("wrn_16_2",)
    )
    images = torch.zeros(1, 3, 32, 32)
    student = reuse_classifier(student, teacher, images)
    Distiller(student, copy.deepcopy(teacher), SimKDLoss()).connect(images)
    for wrong in (other, wide):
        with pytest.raises(ValueError, match="SimKDLoss: the student has the classifier of anothe"):
            Distiller(student, wrong, SimKDLoss()).connect(images)
    assert student.has_classifier_of(teacher.bfloat16())
    assert not student.has_classifier_of(other.bfloat16())


SMALL = """
base:
  data: {name: digits, pad: 1, limit: 120}
  student: {name: resnet8}
  teacher: {name: resnet8x4, train: {epochs: 2}}
  optimizer: {name: lamb, lr: 0.01, weight_decay: 0.02}
  epochs: 3
  batch_size: 8
grid: {loss: [simkd]}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trial of SimKD that has run, and its store."""
    from pld_ray.config.experiment import load_experiment

    folder = tmp_path_factory.mktemp("simkd")
    (folder / "simkd.yaml").write_text(SMALL)
    trial = plan(load_experiment(str(folder / "simkd.yaml"))).cells[0].trial
    store = Store(folder / "results")
    run(trial, store)
    return trial, store


def outputs(network, trial):
    """The logits on the validation images, and the top-1 in percent."""
    images = load(trial.data)
    stream = Stream(images, trial.data, trial.seed, CPU)
    with torch.no_grad():
        logits = torch.cat(
            [network(x) for x in stream.val([torch.arange(len(images.val)).numpy()])]
        )
    right = logits.argmax(1) == torch.from_numpy(images.val_labels)
    return logits, 100 * right.sum().item() / len(right)


def test_a_stored_student_has_the_recorded_top1(trained):
    trial, store = trained
    record, state = store.record(trial.id), store.load_weights(trial)
    network = load_student(trial, store)
    _, top1 = outputs(network, trial)
    assert top1 == record["metrics"]["top1"] > 20  # chance is 10
    teacher = load_student(trial.teacher, store)
    for name in ("weight", "bias"):
        assert torch.equal(state[f"classifier.{name}"], getattr(teacher.fc, name))
    assert not any("fc" in name for name in state)
    counted = sum(v.numel() for k, v in state.items() if "running" not in k and "num_" not in k)
    assert record["parameters"] == counted
    body = 78_042 - 288 - 650  # resnet8 for 10 classes; one colour less two; the last layer
    projector = 64 * 128 + 9 * 128 * 128 + 128 * 256 + 2 * (128 + 128 + 256)
    assert counted == body + projector + 256 * 10 + 10


def test_an_exported_student_gives_the_same_logits(trained, tmp_path):
    import onnxruntime

    trial, store = trained
    expected, _ = outputs(load_student(trial, store), trial)
    export_student(trial, store, tmp_path / "folder")
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert isinstance(again, ReusedClassifier)
    assert torch.equal(outputs(again, trial)[0], expected)
    save(load_student(trial, store), tmp_path / "saved")
    saved = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(outputs(saved, trial)[0], expected)
    (file, _) = export_student(trial, store, tmp_path / "onnx", onnx=True)
    session = onnxruntime.InferenceSession(str(file))

    def by_onnx(x):
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    torch.testing.assert_close(outputs(by_onnx, trial)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_trained_student_teaches_another(trained, experiment):
    trial, store = trained
    _, top1 = outputs(load_student(trial, store), trial)
    teacher = trial.model_dump(mode="json")
    base = trial.teacher.model_dump(mode="json") | {"teacher": teacher}
    base |= {"epochs": 1, "batch_size": 40}
    for loss in ("kd", "at", "sdd", "simkd"):
        student = Trial.model_validate(base | {"loss": loss})
        if student.loss.needs_features:
            check_features(student, 10, 1, 8)
        record = run(student, store)
        assert record["metrics"]["teacher_top1"] == top1
    assert isinstance(load_student(student, store), ReusedClassifier)


def test_an_exported_student_teaches_as_the_network_that_the_error_names(
    trained, experiment, tmp_path
):
    trial, store = trained
    export_student(trial, store, tmp_path / "folder")

    def taught(entry):
        text = SMALL.replace("{name: resnet8x4, train: {epochs: 2}}", entry).replace("simkd", "kd")
        return plan(experiment(text, "epochs=1")).cells[0].trial

    weights = f"weights: {tmp_path / 'folder'}"
    with pytest.raises(InputError, match=r"the config.json beside it is for \{name: ") as error:
        check_trials({"kd": taught(f"{{name: resnet8, {weights}}}")})
    entry = str(error.value).rpartition("is for {")[2].removesuffix("}")
    student = taught(f"{{{entry}, {weights}}}")
    check_trials({"kd": student})
    top1 = store.record(trial.id)["metrics"]["top1"]
    assert run(student, store)["metrics"]["teacher_top1"] == top1


def test_a_teacher_is_checked_as_the_network_that_it_became(experiment):
    """Its projected map has no map before a ReLU, though the network of the same name has one."""
    (plain,) = (c.trial for c in plan(experiment(SMALL, "grid.loss=[ofd]")).cells)
    base = plain.model_dump(mode="json")
    teacher = base | {"loss": "simkd", "student": base["teacher"]["student"]}
    reused = Trial.model_validate(base | {"teacher": teacher})
    assert reused.teacher_name == plain.teacher_name
    check_trials({"plain": plain})
    with pytest.raises(InputError, match="ofd compares the teacher's feature maps before a ReLU"):
        check_trials({"plain": plain, "reused": reused})


def test_landscapes_move_what_was_trained(trained):
    trial, store = trained
    images = load(trial.data)
    found = landscapes.subject(trial, images, store, 16)
    network = load_student(trial, store)
    frozen = {"classifier.weight", "classifier.bias"}
    assert found.weights.keys() == {n for n, _ in network.named_parameters()} - frozen
    with torch.no_grad():
        assert torch.equal(found.logits(found.network(), found.weights), network(found.x))
    values = landscapes.line(found, 0.0, [-0.5, 0.0], 0)
    expected = nn.functional.cross_entropy(network(found.x), found.labels).item()
    assert values["ce"][1] == pytest.approx(expected) != values["ce"][0]


def test_a_trial_resumes_to_the_bit_and_a_gang_has_the_bits_of_trials_alone(
    trained, experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr("pld_ray.distill.keeping.CHECKPOINT_SECONDS", 0)
    trial, alone = trained
    first = trial.model_copy(update={"batch_size": 40})
    changes = {"loss": {"name": "simkd", "factor": 4}, "ema": 0.9, "clip_grad": 1.0}
    second = Trial.model_validate(first.model_dump(mode="json") | changes)
    third = Trial.model_validate(first.model_dump(mode="json") | {"loss": "kd"})
    trials = [first, second, third]
    stores = [Store(tmp_path / name) for name in ("broken", "together")]
    for store in stores:
        shutil.copytree(alone.folder(first.teacher.id), store.folder(first.teacher.id))
    for trial in trials:
        run(trial, alone)

    def stop(metrics):
        raise KeyboardInterrupt

    for trial in (first, second):
        with pytest.raises(KeyboardInterrupt):
            train(trial, load(trial.data), stores[0], stop)
        run(trial, stores[0])
        assert weights(stores[0], trial) == weights(alone, trial)
    ended = {}
    train_gang(
        trials,
        load(first.data),
        stores[1],
        lambda epochs: None,
        lambda trial, error: ended.update({trial.id: error}),
        device=CPU,
    )
    assert ended == {trial.id: None for trial in trials}
    for trial in trials:
        assert weights(stores[1], trial) == weights(alone, trial), trial.label


def test_bfloat16_keeps_the_classifier_in_float32(trained, tmp_path):
    trial, store = trained
    half = trial.model_copy(update={"precision": "bfloat16", "epochs": 1, "batch_size": 40})
    run(half, store)
    teacher = load_student(trial.teacher, store)
    assert torch.equal(store.load_weights(half)["classifier.weight"], teacher.fc.weight)


def test_other_losses_train_the_network_that_they_did_before(experiment):
    trials = [
        plan(experiment(SMALL, f"loss={loss}")).cells[0].trial for loss in ("kd", "at", "simkd")
    ]
    networks = []
    for trial in trials:
        torch.manual_seed(0)
        networks.append(create_student(trial, 10, 1, 8))
    torch.manual_seed(0)
    expected = timm.create_model("resnet8", num_classes=10, in_chans=1).state_dict()
    for network in networks[:2]:
        assert network.state_dict().keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) for name, x in network.state_dict().items())
    body = networks[2].network.state_dict()
    assert body.keys() == expected.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(x, expected[name]) for name, x in body.items())


def test_a_projector_on_one_pixel_needs_batches_of_two_images(experiment):
    trial = plan(experiment(SMALL, "teacher={name: resnet18, train: {epochs: 1}}")).cells[0].trial
    check_features(trial, 10, 1, 16)
    with pytest.raises(InputError, match="cannot train on a batch of one image of 16x16 pixels"):
        check_features(trial, 10, 1, 16, batch=1)
    with pytest.raises(InputError, match="simkd needs networks that end with average pooling"):
        vit = "student={name: vit_tiny_patch16_224, args: {img_size: 32}}"
        check_features(plan(experiment(SMALL, vit)).cells[0].trial, 10, 1, 32)


def test_other_losses_can_train_such_a_student():
    networks = [timm.create_model("resnet8", num_classes=5) for _ in range(2)]
    made = reuse_classifier(*networks, torch.randn(1, 3, 16, 16))
    x, y = torch.randn(2, 3, 16, 16), torch.arange(2)
    for loss in (KDLoss(), ATLoss()):
        distiller = Distiller(made, networks[1], loss)
        distiller.connect(x)
        distiller(x, y).backward()
        assert made.projector[0].weight.grad.any()
        made.zero_grad()
