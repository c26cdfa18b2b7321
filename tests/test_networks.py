"""Networks of the distillation literature against their operations written out in float64."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from pld_ray.config.parts import Model
from pld_ray.errors import InputError
from pld_ray.models.checks import check_model
from pld_ray.models.factory import create_model
from pld_ray.models.features import (
    WithFeatures,
    has_preactivations,
    probe_features,
    teacher_layers,
)


class Layers:
    """The convolutions of a network and their batch norms, in the order of their creation.

    `maps` are the stem and the stages, `before` the same before their last ReLU.
    """

    def __init__(self, network):
        kinds = nn.Conv2d, nn.BatchNorm2d
        self.left = [module for module in network.modules() if isinstance(module, kinds)]
        self.maps, self.before = [], []

    def conv_bn(self, x, stride=1, groups=1):
        """The next convolution, padded to keep the size at stride 1, and the next norm."""
        return self.norm(self.conv(x, stride, groups))

    def conv(self, x, stride=1, groups=1):
        conv = self.left.pop(0)
        return F.conv2d(x, conv.weight, conv.bias, stride, conv.weight.shape[2] // 2, 1, groups)

    def relu(self, x):
        """ReLU, of which the last one before a tap is remembered."""
        self.last = x
        return x.relu()

    def tap(self, x):
        self.maps.append(x)
        self.before.append(self.last)

    def norm(self, x):
        norm = self.left.pop(0)
        mean, var, weight, bias = (
            value[:, None, None]
            for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def shuffle(x, groups):
    """Take one channel of each group in turn."""
    each = x.shape[1] // groups
    return x[:, [group * each + i for i in range(each) for group in range(groups)]]


def vgg(layers, x, depths):
    large = x.shape[2] == 64
    for block, depth in enumerate(depths):
        for _ in range(depth):
            x = layers.relu(layers.conv_bn(x))
        layers.tap(x)
        if block < 3 or (block == 3 and large):
            rows, columns = (x.shape[i] // 2 for i in (2, 3))
            x = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).amax((3, 5))
    return x


def shufflenetv1(layers, x, _):
    x = layers.relu(layers.conv_bn(x))
    layers.tap(x)
    for units in (4, 8, 4):
        for unit in range(units):
            groups = 1 if x.shape[1] == 24 else 3
            stride = 2 if unit == 0 else 1
            main = shuffle(layers.conv_bn(x, groups=groups).relu(), groups)
            main = layers.conv_bn(main, stride, groups=main.shape[1]).relu()
            main = layers.conv_bn(main, groups=3)
            if unit == 0:  # each average counts the zeros of the padding
                nine = [F.pad(x, (1, 1, 1, 1))[:, :, i:, j:] for i in range(3) for j in range(3)]
                rows, columns = (size // 2 for size in x.shape[2:])
                pool = sum(y[:, :, ::2, ::2][:, :, :rows, :columns] for y in nine) / 9
                x = layers.relu(torch.cat([main, pool], 1))
            else:
                x = layers.relu(main + x)
        layers.tap(x)
    return x


def shufflenetv2(layers, x, _):
    x = layers.relu(layers.conv_bn(x))
    layers.tap(x)
    for units in (4, 8, 4):
        for unit in range(units):
            stride = 2 if unit == 0 else 1
            left, right = (x, x) if unit == 0 else x.split(x.shape[1] // 2, 1)
            if unit == 0:
                left = layers.conv_bn(layers.conv_bn(left, 2, groups=x.shape[1])).relu()
            right = layers.conv_bn(right).relu()
            right = layers.conv_bn(right, stride, groups=right.shape[1])
            # nothing before the last ReLU of the left branch is kept
            x = shuffle(layers.relu(torch.cat([left, layers.conv_bn(right)], 1)), 2)
        layers.tap(x)
    return layers.conv_bn(x).relu()


def resnet(layers, x, depths, convs=2):
    """Blocks of two or three convolutions; `depths` of four stages, or three of CIFAR networks."""
    for stage, depth in enumerate(depths):
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            main = x
            for number in range(convs):
                last, strided = number == convs - 1, number == convs - 2
                main = layers.conv_bn(main, stride if strided else 1)
                main = main if last else main.relu()
            projects = main.shape != x.shape
            x = layers.relu(main + (layers.conv_bn(x, stride) if projects else x))
        layers.tap(x)
    return x


def cifar_resnet(layers, x, depths, convs=2):
    x = layers.relu(layers.conv_bn(x))
    layers.tap(x)
    return resnet(layers, x, depths, convs)


def imagenet_resnet(layers, x, depths, convs=2):
    x = layers.relu(layers.conv_bn(x, 2))
    layers.tap(x)
    return resnet(layers, F.max_pool2d(x, 3, 2, 1), depths, convs)


def resnet50(layers, x, depths):
    return cifar_resnet(layers, x, depths, 3)


def imagenet_resnet50(layers, x, depths):
    return imagenet_resnet(layers, x, depths, 3)


def wrn(layers, x, depths):
    maps = [x := layers.conv(x)]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            pre = layers.relu(layers.norm(x))
            if block == 0:
                layers.before.append(layers.last)  # of the stage before
            stride = 2 if stage > 0 and block == 0 else 1
            main = layers.conv(layers.conv_bn(pre, stride).relu())
            x = main + (layers.conv(pre, stride) if main.shape != x.shape else x)
        maps.append(x)
    layers.maps = maps
    x = layers.relu(layers.norm(x))
    layers.before.append(layers.last)
    return x


def mobilenetv1(layers, x, _):
    x = layers.conv_bn(x, 2).relu()
    for strides in ([1], [2, 1], [2, 1], [2, 1, 1, 1, 1, 1], [2, 1]):
        for stride in strides:
            x = layers.conv_bn(x, stride, groups=x.shape[1]).relu()
            x = layers.relu(layers.conv_bn(x))
        layers.tap(x)
    return x


RELU = {"act_layer": "relu"}  # timm's has ReLU6
NEW = ["resnet14", "wrn_16_1", "resnet18_cifar", "vgg8_cifar", "vgg19_cifar", "shufflenetv1"]
NEW += ["shufflenetv2", "shufflenetv2_x0_5", "shufflenetv2_x2_0"]
REFERENCES = [
    ("vgg8_cifar", vgg, [1, 1, 1, 1, 1], 32),
    ("vgg11_cifar", vgg, [1, 1, 2, 2, 2], 64),
    ("vgg13_cifar", vgg, [2, 2, 2, 2, 2], 32),
    ("vgg16_cifar", vgg, [2, 2, 3, 3, 3], 32),
    ("vgg19_cifar", vgg, [2, 2, 4, 4, 4], 32),
    ("shufflenetv1", shufflenetv1, None, 32),
    ("shufflenetv2", shufflenetv2, None, 32),
    ("shufflenetv2_x2_0", shufflenetv2, None, 32),
    ("resnet18_cifar", cifar_resnet, [2, 2, 2, 2], 32),
    ("resnet50_cifar", resnet50, [3, 4, 6, 3], 32),
    ("resnet8x4", cifar_resnet, [1, 1, 1], 32),
    ("resnet20", cifar_resnet, [3, 3, 3], 32),
    ("wrn_16_1", wrn, [2, 2, 2], 32),
    ("wrn_16_2", wrn, [2, 2, 2], 32),
    ("resnet34", imagenet_resnet, [3, 4, 6, 3], 64),
    ("resnet50", imagenet_resnet50, [3, 4, 6, 3], 64),
    ("mobilenetv1_100", mobilenetv1, None, 64),
]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "reference", "depths", "size"), REFERENCES, ids=[row[0] for row in REFERENCES]
)
def test_networks_against_their_operations(name, reference, depths, size):
    generator = torch.Generator().manual_seed(0)
    args = RELU if name == "mobilenetv1_100" else {}
    network = create_model(Model(name=name, args=args), 10, 3, size).double().eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):  # so that every operation shows in the result
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            norm.bias.normal_(generator=generator)
            norm.running_mean.normal_(generator=generator)
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    layers = Layers(network)
    last = reference(layers, x, depths)
    maps = layers.maps
    assert not layers.left
    further = frozenset(["preact"] if has_preactivations(network) else [])
    assert bool(further) == (name != "mobilenetv1_100")
    logits, features = WithFeatures(network, further)(x.to(memory_format=torch.channels_last))
    for before in features.further.values():
        torch.testing.assert_close(before, layers.before[1:], rtol=1e-9, atol=1e-9)
    pooled = last.mean((2, 3))
    linear = network.get_classifier()
    torch.testing.assert_close(features.stages, maps[1:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, pooled @ linear.weight.T + linear.bias)
    if hasattr(network, "stem"):  # a CIFAR network
        torch.testing.assert_close(network.stem(x), maps[0], rtol=1e-9, atol=1e-9)


WITH_PREACT = ["resnet14", "resnet8x4", "wrn_16_2", "vgg8_cifar", "shufflenetv1", "shufflenetv2"]
WITH_PREACT += ["resnet18_cifar", "resnet18", "resnet26", "resnet26d", "seresnet18"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", WITH_PREACT)
def test_maps_before_a_relu_change_no_bit_of_anything_else(name, training):
    torch.manual_seed(0)
    network = create_model(Model(name=name), 10, 3, 32).train(training)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    found = []
    for further in (frozenset(), frozenset(["preact"])):
        network.load_state_dict(state)
        logits, features = WithFeatures(network, further)(x)
        maps = [*features.stages, features.pooled, *features.further.get("preact", [])]
        gradients = torch.autograd.grad(logits.square().sum(), network.parameters())
        found.append([logits, *maps, *gradients, *network.state_dict().values()])
        assert len(features.further.get("preact", [])) in (0, len(features.stages))
    plain, more = found
    extra = len(more) - len(plain)
    del more[2 + extra : 2 + 2 * extra]
    assert extra == len(WithFeatures(network).stages)
    assert all(torch.equal(a, b) for a, b in zip(plain, more, strict=True))


def test_norms_are_those_that_the_relus_follow():
    for name, places in {
        "resnet14": "stages.0.1.main.4 stages.1.1.main.4 stages.2.1.main.4",
        "resnet50_cifar": " ".join(
            f"stages.{i}.{n - 1}.main.7" for i, n in enumerate([3, 4, 6, 3])
        ),
        "wrn_16_2": "stages.1.0.pre.0 stages.2.0.pre.0 head.0",
        "vgg13_cifar": "stages.0.5 stages.1.5 stages.2.5 stages.3.5",
        "resnet18": " ".join(f"layer{i}.1.bn2" for i in (1, 2, 3, 4)),
        "resnet50": "layer1.2.bn3 layer2.3.bn3 layer3.5.bn3 layer4.2.bn3",
        "shufflenetv1": "",
        "shufflenetv2": "",
    }.items():
        network = timm.create_model(name, num_classes=10)
        layers = teacher_layers(network, frozenset(["preact"]))
        assert layers.norms == [network.get_submodule(place) for place in places.split()]
        assert all(isinstance(norm, nn.BatchNorm2d) for norm in layers.norms)
        assert layers.classifier is network.get_classifier()
        assert teacher_layers(network).norms == []


def test_mobilenetv1_of_timm_is_that_of_the_literature_but_for_relu6():
    with torch.device("meta"):
        network, own = (timm.create_model("mobilenetv1_100", **args) for args in ({}, RELU))
        features = probe_features(network, torch.zeros(1, 3, 224, 224))
    assert sum(x.numel() for x in network.parameters()) == 4_231_976
    sizes = [(128, 56), (256, 28), (512, 14), (1024, 7)]
    assert [(f.shape[1], f.shape[2]) for f in features.stages] == sizes
    assert features.pooled.shape == (1, 1024)
    kinds = [{type(m) for m in one.modules()} & {nn.ReLU, nn.ReLU6} for one in (network, own)]
    assert kinds == [{nn.ReLU6}, {nn.ReLU}]


@pytest.mark.parametrize("name", NEW)
def test_a_step_trains_every_weight_on_small_grey_images(name):
    torch.manual_seed(0)
    assert check_model(Model(name=name), 10, 1, 8) == []
    network = create_model(Model(name=name), 10, 1, 8).double()
    x, labels = torch.randn(16, 1, 8, 8).double(), torch.arange(16) % 10
    before = F.cross_entropy(network(x), labels)
    before.backward()
    squares = [p.grad.square().sum().item() for p in network.parameters()]
    assert all(square > 0 for square in squares)
    rate = 1e-8 / sum(squares)  # so small that the loss is linear in the weights
    torch.optim.SGD(network.parameters(), lr=rate).step()
    change = F.cross_entropy(network(x), labels) - before
    assert change.item() == pytest.approx(-1e-8, rel=0.01)


def test_first_weights_are_those_of_the_reference_networks():
    torch.manual_seed(0)
    vgg16 = timm.create_model("vgg16_cifar", num_classes=100)
    for conv in (m for m in vgg16.modules() if isinstance(m, nn.Conv2d)):
        expected = (2 / (9 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.06)
        assert conv.weight.abs().max() > 3 * expected  # normal, not uniform
        assert not conv.bias.any()
    assert vgg16.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not vgg16.fc.bias.any()
    for name in ("shufflenetv1", "shufflenetv2"):  # torch's default
        network = timm.create_model(name, num_classes=100)
        conv = max(
            (m for m in network.modules() if isinstance(m, nn.Conv2d)),
            key=lambda m: m.weight.numel(),
        )
        bound = conv.weight[0].numel() ** -0.5
        assert 0.99 * bound < conv.weight.abs().max() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert network.fc.bias.any()


def test_a_batch_of_one_small_image_is_told():
    with pytest.raises(InputError, match="'vgg8_cifar' cannot train on a batch of one image of 8x"):
        check_model(Model(name="vgg8_cifar"), 10, 1, 8, batch=1)
