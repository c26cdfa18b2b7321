import pytest
import timm
import torch
from safetensors.torch import save_file

from pld_ray.config.parts import Model, Weights
from pld_ray.errors import InputError
from pld_ray.models.checks import check_model
from pld_ray.models.factory import create_model, load_teacher

LITERATURE = {  # parameters for 100 classes, in millions, as the CRD and mdistiller papers count
    "resnet20": 0.278,
    "resnet56": 0.862,
    "resnet8x4": 1.234,
    "resnet32x4": 7.434,
    "wrn_40_1": 0.570,
    "wrn_40_2": 2.255,
    "mobilenetv2_cifar": 0.813,
    "resnet50_cifar": 23.705,
}


@pytest.mark.parametrize("name", LITERATURE)
def test_parameter_counts_match_the_literature(name):
    with torch.device("meta"):
        network = create_model(Model(name=name), 100, 3, 32)
    parameters = sum(x.numel() for x in network.parameters())
    assert round(parameters / 1e6, 3) == LITERATURE[name]


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet32", "resnet110", "wrn_16_2", "mobilenetv2_cifar", "resnet8x4"]
)
def test_cifar_networks_are_timm_models_of_any_size(name):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    x = torch.zeros(2, 1, 16, 16)
    assert model(x).shape == (2, 7)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(features), model(x))


def test_the_depth_in_the_name_is_the_number_of_weighted_layers():
    for name, depth in {
        "resnet20": 20,
        "resnet56": 56,
        "resnet8x4": 8,
        "resnet50_cifar": 50,
    }.items():
        model = timm.create_model(name)
        layers = [
            layer
            for path, layer in model.named_modules()
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) and "shortcut" not in path
        ]
        assert len(layers) == depth


def test_first_weights_of_classifiers_are_those_of_the_reference_networks():
    wrn, mobile = (timm.create_model(name) for name in ("wrn_16_2", "mobilenetv2_cifar"))
    assert not wrn.fc.bias.any() and not mobile.fc.bias.any()
    assert mobile.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    bound = 128**-0.5  # torch draws a linear layer uniformly from this range
    assert wrn.fc.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert timm.create_model("resnet20").fc.bias.any()


def test_any_timm_name_works_and_a_wrong_one_gets_the_nearest():
    assert create_model(Model(name="mobilenetv4_conv_small"), 5, 3, 32)(
        torch.zeros(2, 3, 64, 64)
    ).shape == (2, 5)
    assert create_model(Model(name="vit_tiny_patch16_224"), 5, 1, 32)(
        torch.zeros(2, 1, 32, 32)
    ).shape == (2, 5)
    with pytest.raises(
        InputError, match=r"'resnet55' is not known to timm; did you mean 'resnet56'"
    ):
        create_model(Model(name="resnet55"), 5, 3, 32)
    with pytest.raises(InputError, match="cannot be made with"):
        create_model(Model(name="resnet50", args={"no_such": 1}), 5, 3, 32)


def test_teachers_from_a_file_must_share_the_classes(tmp_path):
    model = create_model(Model(name="resnet8"), 5, 3, 32)
    path = tmp_path / "teacher.safetensors"
    save_file(model.state_dict(), path)
    teacher = Weights(name="resnet8", weights=str(path))
    check_model(teacher, 5, 3, 32)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_teacher(teacher, 5, 3, 32).eval()(x), model.eval()(x))
    with pytest.raises(InputError, match="seems to be for 5 classes, but the data has 10"):
        check_model(teacher, 10, 3, 32)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        check_model(teacher, 5, 3, 32)
    with pytest.raises(InputError, match="has 1000 classes, but the data has 100;"):
        check_model(Weights(name="resnet152.a1h_in1k", weights="pretrained"), 100, 3, 224)
