import pkgutil

import pytest
import timm
import torch
from safetensors.torch import save_file

from pld_ray.config.parts import Model, Weights
from pld_ray.errors import InputError
from pld_ray.models import networks
from pld_ray.models.checks import check_model
from pld_ray.models.factory import create_model, load_teacher

PARAMETERS = {  # for 100 classes, counted on the networks of the CRD and mdistiller repositories
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "resnet18_cifar": 11_220_132,
    "resnet50_cifar": 23_705_252,
    "mobilenetv2_cifar": 812_836,
    "vgg8_cifar": 3_965_028,
    "vgg11_cifar": 9_277_284,
    "vgg13_cifar": 9_462_180,
    "vgg16_cifar": 14_774_436,
    "vgg19_cifar": 20_086_692,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}


def shufflenetv2_parameters(*widths: int) -> int:
    """Sum the convolutions, two numbers per channel of a norm, and the classifier."""
    inputs, total = 24, 24 * 3 + 2 * 24
    for width, units in zip(widths[:3], (3, 7, 3), strict=True):
        half = width // 2
        total += (9 + 2 + half) * inputs + 2 * half  # the left branch of the first unit
        total += inputs * half + 2 * half + (9 + 2) * half + half * half + 2 * half
        total += units * (2 * (half * half + 2 * half) + (9 + 2) * half)
        inputs = width
    return total + (inputs + 2) * widths[3] + (widths[3] + 1) * 100


# One more block in each stage of a ResNet has two 3x3 convolutions and their norms.
BLOCKS = sum(2 * (9 * width**2 + 2 * width) for width in (16, 32, 64))
DERIVED = {
    "resnet8": 278_324 - 2 * BLOCKS,
    "resnet14": 278_324 - BLOCKS,
    "shufflenetv2_x0_5": shufflenetv2_parameters(48, 96, 192, 1024),
    "shufflenetv2_x1_5": shufflenetv2_parameters(176, 352, 704, 1024),
    "shufflenetv2_x2_0": shufflenetv2_parameters(224, 488, 976, 2048),
}


@pytest.mark.parametrize(("name", "count"), [*PARAMETERS.items(), *DERIVED.items()])
def test_parameter_counts_match_the_literature(name, count):
    with torch.device("meta"):
        network = create_model(Model(name=name), 100, 3, 32)
    assert sum(x.numel() for x in network.parameters()) == count


def test_counts_are_derived_as_those_of_the_literature():
    assert shufflenetv2_parameters(116, 232, 464, 1024) == PARAMETERS["shufflenetv2"]
    assert PARAMETERS["resnet20"] + 2 * BLOCKS == PARAMETERS["resnet32"]


def test_every_shipped_network_has_a_count_and_a_name_that_timm_lacks():
    files = [module.name for module in pkgutil.iter_modules(networks.__path__)]
    names = [name for file in files for name in timm.list_models(module=file)]
    assert sorted(names) == sorted([*PARAMETERS, *DERIVED])
    assert hasattr(timm.models, "vgg11") and hasattr(timm.models, "resnet18")
    assert not [name for name in names if hasattr(timm.models, name)]


@pytest.mark.parametrize("size", [16, 5])
@pytest.mark.parametrize("name", sorted([*PARAMETERS, *DERIVED]))
def test_cifar_networks_are_timm_models_of_any_size(name, size):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    x = torch.zeros(2, 1, size, size)
    assert model(x).shape == (2, 7)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(features), model(x))


def test_the_depth_in_the_name_is_the_number_of_weighted_layers():
    for name, depth in {
        "resnet20": 20,
        "resnet56": 56,
        "resnet8x4": 8,
        "resnet14": 14,
        "resnet18_cifar": 18,
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
