import pytest
import timm
import torch
from safetensors.torch import load_file

from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.data.stream import Stream
from pld_ray.distill.loop import train
from pld_ray.errors import InputError
from pld_ray.models.export import export_student, save
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store

TEXT = """
base: {data: {name: digits, limit: 200}, epochs: 3, batch_size: 50, loss: ce}
grid:
  student:
    - resnet8
    - name: vit_tiny_patch16_224
      args: {img_size: 8, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}
"""
CPU = torch.device("cpu")


def trained(trial, store):
    """The student of a finished trial, and its dataset."""
    images = load(trial.data)
    model = create_model(trial.student, *images.shape).eval()
    model.load_state_dict(store.load_weights(trial))
    return model, images


def top1(model, trial, images):
    stream = Stream(images, trial.data, trial.seed, CPU)
    with torch.no_grad():
        logits = torch.cat([model(x) for x in stream.val([torch.arange(len(images.val)).numpy()])])
    labels = torch.from_numpy(images.val_labels)
    return 100 * (logits.argmax(1) == labels).double().mean().item(), logits


@pytest.mark.parametrize("number", [0, 1])
def test_a_student_comes_back_with_the_same_accuracy(experiment, tmp_path, number):
    trial, store = plan(experiment(TEXT)).cells[number].trial, Store(tmp_path / "results")
    train(trial, load(trial.data), store, lambda metrics: None)
    model, images = trained(trial, store)
    expected = store.record(trial.id)["metrics"]["top1"]
    assert top1(model, trial, images)[0] == pytest.approx(expected)
    export_student(trial, store, tmp_path / "student")
    again = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
    assert torch.equal(top1(again, trial, images)[1], top1(model, trial, images)[1])
    assert again.pretrained_cfg["mean"] == pytest.approx(images.mean)


def test_onnx_gives_the_same_logits(experiment, tmp_path):
    import onnxruntime

    trial, store = plan(experiment(TEXT)).cells[0].trial, Store(tmp_path / "results")
    train(trial, load(trial.data), store, lambda metrics: None)
    model, images = trained(trial, store)
    path, _ = export_student(trial, store, tmp_path / "student", onnx=True)
    session = onnxruntime.InferenceSession(str(path))

    def run(x):
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    found, expected = (top1(m, trial, images) for m in (run, model))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)
    assert found[0] == pytest.approx(store.record(trial.id)["metrics"]["top1"])


@pytest.mark.parametrize(
    ("name", "made", "told"),
    [
        ("resnet8", {"num_classes": 4, "in_chans": 1}, {}),
        (
            "vit_tiny_patch16_224",
            {"num_classes": 4, "img_size": 8, "patch_size": 4, "embed_dim": 48, "depth": 2},
            {"img_size": 8, "patch_size": 4, "embed_dim": 48, "depth": 2},
        ),
    ],
)
def test_what_is_saved_is_what_timm_opens(tmp_path, name, made, told):
    network = timm.create_model(name, **made).eval()
    x = torch.randn(2, made.get("in_chans", 3), 8, 8)
    save(network, tmp_path / "folder", mean=(0.5,), **told)
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert torch.equal(again(x), network(x)) and again.pretrained_cfg["mean"] == [0.5]
    save(network, tmp_path / "weights.safetensors")
    kept = load_file(tmp_path / "weights.safetensors")
    assert kept.keys() == network.state_dict().keys()
    if told:
        with pytest.raises(InputError, match="pass the other arguments that were given to timm"):
            save(network, tmp_path / "wrong")
        assert not (tmp_path / "wrong").exists()
    with pytest.raises(InputError, match="timm did not make this Linear: expected a path"):
        save(torch.nn.Linear(2, 2), tmp_path / "small")


def test_a_network_of_the_same_shapes_with_other_logits_is_not_saved(tmp_path):
    network = timm.create_model("resnet10t", num_classes=4, global_pool="max")
    with pytest.raises(InputError, match="gives other logits; pass the other arguments"):
        save(network, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    save(network, tmp_path / "right", global_pool="max")
    x = torch.randn(2, 3, 64, 64)
    again = timm.create_model(f"local-dir:{tmp_path / 'right'}", pretrained=True).eval()
    assert torch.equal(again(x), network.eval()(x))
