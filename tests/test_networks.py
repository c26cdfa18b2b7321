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
from pld_ray.models.features import WithFeatures, probe_features


class Layers:
    """The convolutions of a network and their batch norms, in the order of their creation."""

    def __init__(self, network):
        kinds = nn.Conv2d, nn.BatchNorm2d
        self.left = [module for module in network.modules() if isinstance(module, kinds)]

    def conv_bn(self, x, stride=1, groups=1):
        """The next convolution, padded to keep the size at stride 1, and the next norm."""
        conv, norm = self.left.pop(0), self.left.pop(0)
        x = F.conv2d(x, conv.weight, conv.bias, stride, conv.weight.shape[2] // 2, 1, groups)
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
    large, maps = x.shape[2] == 64, []
    for block, depth in enumerate(depths):
        for _ in range(depth):
            x = layers.conv_bn(x).relu()
        maps.append(x)
        if block < 3 or (block == 3 and large):
            rows, columns = (x.shape[i] // 2 for i in (2, 3))
            x = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).amax((3, 5))
    return maps, x


def shufflenetv1(layers, x, _):
    x = layers.conv_bn(x).relu()
    maps = [x]
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
                x = torch.cat([main, pool], 1).relu()
            else:
                x = (main + x).relu()
        maps.append(x)
    return maps, x


def shufflenetv2(layers, x, _):
    x = layers.conv_bn(x).relu()
    maps = [x]
    for units in (4, 8, 4):
        for unit in range(units):
            stride = 2 if unit == 0 else 1
            left, right = (x, x) if unit == 0 else x.split(x.shape[1] // 2, 1)
            if unit == 0:
                left = layers.conv_bn(layers.conv_bn(left, 2, groups=x.shape[1])).relu()
            right = layers.conv_bn(right).relu()
            right = layers.conv_bn(right, stride, groups=right.shape[1])
            x = shuffle(torch.cat([left, layers.conv_bn(right).relu()], 1), 2)
        maps.append(x)
    return maps, layers.conv_bn(x).relu()


def resnet18(layers, x, _):
    x = layers.conv_bn(x).relu()
    maps = [x]
    for stage in range(4):
        for block in range(2):
            down = stage > 0 and block == 0
            main = layers.conv_bn(layers.conv_bn(x, 2 if down else 1).relu())
            x = (main + (layers.conv_bn(x, 2) if down else x)).relu()
        maps.append(x)
    return maps, x


def mobilenetv1(layers, x, _):
    x, maps = layers.conv_bn(x, 2).relu(), []
    for strides in ([1], [2, 1], [2, 1], [2, 1, 1, 1, 1, 1], [2, 1]):
        for stride in strides:
            x = layers.conv_bn(x, stride, groups=x.shape[1]).relu()
            x = layers.conv_bn(x).relu()
        maps.append(x)
    return maps, x


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
    ("resnet18_cifar", resnet18, None, 32),
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
    maps, last = reference(layers, x, depths)
    assert not layers.left
    logits, features = WithFeatures(network)(x.to(memory_format=torch.channels_last))
    pooled = last.mean((2, 3))
    linear = network.get_classifier()
    torch.testing.assert_close(features.stages, maps[1:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, pooled @ linear.weight.T + linear.bias)
    if hasattr(network, "stem"):  # a CIFAR network
        torch.testing.assert_close(network.stem(x), maps[0], rtol=1e-9, atol=1e-9)


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
