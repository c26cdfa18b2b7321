"""CIFAR networks of the distillation literature: ResNet, Wide ResNet, MobileNetV2, and their parts.

They are the networks of the CRD and mdistiller repositories, and their first weights are drawn from
the same distributions. After this module is imported, timm's
`create_model("resnet8x4", num_classes=100)` finds them. They take any image size and number of
channels. VGG and ShuffleNet are in `cifar_vgg` and `cifar_shufflenet`.

timm has ImageNet networks called resnet18, resnet50, vgg11 and so on. A name that timm has keeps
timm's meaning: the CIFAR networks of these families end in "_cifar".
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, register_model
from torch import Tensor, nn


class CifarNet(nn.Module):
    """A CIFAR network: stem, stages, head, pooling and a linear layer, with timm's method names.

    Args:
        stem: Module before the first stage.
        stages: The stages, in order.
        head: Module between the last stage and the pooling.
        width: Number of channels after the head.
        classes: Number of classes.
        taps: Indices of the stages whose features losses compare, counted from 0. Default: all.
        he_normal: Whether the weights of convolutions are drawn from a normal distribution of
            variance 2 / (k^2 outputs), and their biases are 0. Otherwise they stay torch's default.
        relu_last: Whether a ReLU ends each stage, so that there is a map before it.

    Class attributes:
        has_linear_head: The logits are a linear layer of the mean of the last feature map.
    """

    has_linear_head = True

    def __init__(
        self,
        stem: nn.Module,
        stages: list[nn.Module],
        head: nn.Module,
        width: int,
        classes: int,
        taps: list[int] | None = None,
        he_normal: bool = True,
        relu_last: bool = True,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages: Any = nn.ModuleList(stages)
        self.head: Any = head
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)
        self.num_features = width
        self.num_classes = classes
        self.taps = taps or list(range(len(stages)))
        self.has_preactivations = relu_last
        for module in self.modules():
            if he_normal and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to the last feature map [B, width, h, w]."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)

    def forward_intermediates(self, x: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Compute the last feature map and the outputs of some stages.

        Args:
            x: Images [B, channels, H, W].
            indices: Indices of the stages, counted from 0.

        Returns:
            The last feature map [B, width, h, w], and the outputs of the stages in the order of
            `indices`.
        """
        x = self.stem(x)
        stages = []
        for stage in self.stages:
            x = stage(x)
            stages.append(x)
        return self.head(x), [stages[i] for i in indices]

    def forward_preactivations(
        self, x: Tensor, indices: list[int]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Compute what `forward_intermediates` does, and the stages before their last ReLU.

        Args:
            x: Images [B, channels, H, W].
            indices: Indices of the stages, counted from 0.

        Returns:
            The last feature map [B, width, h, w], the outputs of the stages, and the same maps
            before the last ReLU.
        """
        if not self.has_preactivations:  # no ReLU follows: the stages are what it would be given
            last_map, linear = self.forward_intermediates(x, indices)
            return last_map, linear, linear
        x = self.stem(x)
        before, stages = [], []
        for stage in self.stages:
            *modules, last = stage
            for module in modules:
                x = module(x)
            pre, x = (x, last(x)) if isinstance(last, nn.ReLU) else last.both(x)
            before.append(pre)
            stages.append(x)
        return self.head(x), [stages[i] for i in indices], [before[i] for i in indices]

    def last_norms(self, indices: list[int]) -> list[nn.Module]:
        """Return the batch norm before the last ReLU of each stage; none if some have none.

        That of a residual block is the last one of its main branch.
        """
        norms: list[nn.Module] = []
        for stage in self.stages:
            last: Any = stage[-1]
            if isinstance(last, nn.ReLU):
                norms.append(stage[-2])
            elif isinstance(last, Residual) and self.has_preactivations:
                norms.append(last.main[-1])
            else:
                return []
        return [norms[i] for i in indices]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last feature map to logits.

        Args:
            x: The last feature map [B, width, h, w].
            pre_logits: Whether to return the pooled features instead of the logits.

        Returns:
            Logits [B, C], or pooled features [B, width].
        """
        x = self.pool(x).flatten(1)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, channels, H, W] to logits [B, C]."""
        return self.forward_head(self.forward_features(x))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Create a convolution without bias, padded to keep the image size at stride 1."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[Any]:
    """Create a convolution and its batch normalisation."""
    return [_conv(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """A residual block: act(main(x) + shortcut(x)).

    The shortcut is a 1x1 convolution with batch normalisation if the shape changes, and the
    identity otherwise.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        stride: Factor by which the block reduces height and width.
        main: Modules of the main branch.
        act: Whether a ReLU follows the sum.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, main: list[Any], act: bool) -> None:
        super().__init__()
        self.main = nn.Sequential(*main)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*conv_bn(inputs, outputs, 1, stride))
        )
        self.act = nn.ReLU() if act else nn.Identity()

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum before the last ReLU, and the output."""
        total = self.main(x) + self.shortcut(x)
        return total, self.act(total)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        return self.both(x)[1]


class PreActivation(nn.Module):
    """A Wide ResNet block (Zagoruyko and Komodakis 2016): norm and ReLU before each convolution.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        stride: Factor by which the block reduces height and width.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.pre = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.main = nn.Sequential(
            *conv_bn(inputs, outputs, 3, stride), nn.ReLU(), _conv(outputs, outputs, 3)
        )
        self.shortcut = None if inputs == outputs else _conv(inputs, outputs, 1, stride)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input after the first norm, and the output."""
        norm, relu = self.pre
        normed = norm(x)
        pre = relu(normed)
        return normed, self.main(pre) + (x if self.shortcut is None else self.shortcut(pre))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        return self.both(x)[1]


class WideResNet(CifarNet):
    """A Wide ResNet: the last ReLU of a stage, and the norm before it, are in what follows."""

    def forward_preactivations(
        self, x: Tensor, indices: list[int]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Compute the stages and what the ReLU after each is given; see `CifarNet`."""
        x = self.stem(x)
        before, stages = [], []
        for stage in self.stages:
            first, *blocks = stage
            normed, x = first.both(x)
            for block in blocks:
                x = block(x)
            before.append(normed)
            stages.append(x)
        norm, relu = self.head
        before.append(norm(x))
        return relu(before[-1]), [stages[i] for i in indices], [before[i + 1] for i in indices]

    def last_norms(self, indices: list[int]) -> list[nn.Module]:
        """Return the norm that follows each stage."""
        following = [*(stage[0].pre for stage in self.stages), self.head]
        return [following[i + 1][0] for i in indices]


def _basic(inputs: int, outputs: int, stride: int) -> Residual:
    """Create a ResNet block of two 3x3 convolutions."""
    main = [*conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *conv_bn(outputs, outputs, 3)]
    return Residual(inputs, outputs, stride, main, act=True)


def _bottleneck(inputs: int, outputs: int, stride: int) -> Residual:
    """Create a ResNet bottleneck block of 1x1, 3x3 and 1x1 convolutions."""
    middle = outputs // 4
    main = [*conv_bn(inputs, middle, 1), nn.ReLU(), *conv_bn(middle, middle, 3, stride)]
    main += [nn.ReLU(), *conv_bn(middle, outputs, 1)]
    return Residual(inputs, outputs, stride, main, act=True)


def _inverted(inputs: int, outputs: int, stride: int, expansion: int) -> nn.Module:
    """Create an inverted residual block of MobileNetV2."""
    wide = inputs * expansion
    main = [*conv_bn(inputs, wide, 1), nn.ReLU(), *conv_bn(wide, wide, 3, stride, groups=wide)]
    main += [nn.ReLU(), *conv_bn(wide, outputs, 1)]
    if stride == 1 and inputs == outputs:
        return Residual(inputs, outputs, stride, main, act=False)
    return nn.Sequential(*main)


def _stages(block: Any, inputs: int, widths: list[int], depths: list[int]) -> list[nn.Module]:
    """Create one stage per width; every stage except the first halves height and width."""
    stages: list[nn.Module] = []
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        blocks = [block(inputs, width, 1 if i == 0 else 2)]
        blocks += [block(width, width, 1) for _ in range(depth - 1)]
        stages.append(nn.Sequential(*blocks))
        inputs = width
    return stages


def _resnet(depth: int, wide: int, num_classes: int, in_chans: int) -> CifarNet:
    """Create ResNet-(6n + 2) for 32x32 images (He et al. 2016); `wide` 4 gives the x4 of CRD."""
    stem = 16 if wide == 1 else 32
    widths = [16 * wide, 32 * wide, 64 * wide]
    stages = _stages(_basic, stem, widths, [(depth - 2) // 6] * 3)
    first = nn.Sequential(*conv_bn(in_chans, stem, 3), nn.ReLU())
    return CifarNet(first, stages, nn.Identity(), widths[-1], num_classes)


def _wrn(depth: int, wide: int, num_classes: int, in_chans: int) -> CifarNet:
    """Create Wide ResNet-(6n + 4) (Zagoruyko and Komodakis 2016)."""
    widths = [16 * wide, 32 * wide, 64 * wide]
    stages = _stages(PreActivation, 16, widths, [(depth - 4) // 6] * 3)
    head = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
    network = WideResNet(_conv(in_chans, 16, 3), stages, head, widths[-1], num_classes)
    nn.init.zeros_(network.fc.bias)
    return network


def _resnet18(num_classes: int, in_chans: int) -> CifarNet:
    """Create ResNet-18 with a 3x3 stem of stride 1 and no max-pooling."""
    stages = _stages(_basic, 64, [64, 128, 256, 512], [2, 2, 2, 2])
    stem = nn.Sequential(*conv_bn(in_chans, 64, 3), nn.ReLU())
    return CifarNet(stem, stages, nn.Identity(), 512, num_classes)


def _resnet50(num_classes: int, in_chans: int) -> CifarNet:
    """Create ResNet-50 with a 3x3 stem of stride 1 and no max-pooling."""
    stages = _stages(_bottleneck, 64, [256, 512, 1024, 2048], [3, 4, 6, 3])
    stem = nn.Sequential(*conv_bn(in_chans, 64, 3), nn.ReLU())
    return CifarNet(stem, stages, nn.Identity(), 2048, num_classes)


def _mobilenetv2(num_classes: int, in_chans: int) -> CifarNet:
    """Create MobileNetV2 of half width."""
    stages: list[nn.Module] = []
    inputs = 16
    table = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)]
    table += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, channels, depth, stride in table:
        width = channels // 2
        blocks = [_inverted(inputs, width, stride, expansion)]
        blocks += [_inverted(width, width, 1, expansion) for _ in range(depth - 1)]
        stages.append(nn.Sequential(*blocks))
        inputs = width
    stem = nn.Sequential(*conv_bn(in_chans, 16, 3, 2), nn.ReLU())
    head = nn.Sequential(*conv_bn(inputs, 1280, 1), nn.ReLU())
    # Compare the last stage of each resolution, as in the CRD repository. These are four stages,
    # as many as ResNet-50 has.
    # They are linear: no ReLU ends a stage.
    taps = [1, 2, 4, 6]
    network = CifarNet(stem, stages, head, 1280, num_classes, taps, relu_last=False)
    nn.init.normal_(network.fc.weight, std=0.01)
    nn.init.zeros_(network.fc.bias)
    return network


def register(name: str, doc: str, make: Any, *shape: int) -> None:
    """Register `make(*shape)` with timm, which can then load its weights like any other's."""

    def entry(pretrained: bool = False, **kwargs: Any) -> CifarNet:
        kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or PretrainedCfg(
            num_classes=100, input_size=(3, 32, 32), classifier="fc"
        )
        return build_model_with_cfg(partial(make, *shape), name, pretrained, **kwargs)

    entry.__name__, entry.__doc__, entry.__module__ = name, doc, make.__module__
    register_model(entry)


register("resnet8", "ResNet-8 for 32x32 images.", _resnet, 8, 1)
register("resnet14", "ResNet-14 for 32x32 images.", _resnet, 14, 1)
register("resnet20", "ResNet-20 for 32x32 images.", _resnet, 20, 1)
register("resnet32", "ResNet-32 for 32x32 images.", _resnet, 32, 1)
register("resnet44", "ResNet-44 for 32x32 images.", _resnet, 44, 1)
register("resnet56", "ResNet-56 for 32x32 images.", _resnet, 56, 1)
register("resnet110", "ResNet-110 for 32x32 images.", _resnet, 110, 1)
register("resnet8x4", "ResNet-8 with four times the channels.", _resnet, 8, 4)
register("resnet32x4", "ResNet-32 with four times the channels.", _resnet, 32, 4)
register("wrn_16_1", "Wide ResNet of depth 16, width 1.", _wrn, 16, 1)
register("wrn_16_2", "Wide ResNet of depth 16, width 2.", _wrn, 16, 2)
register("wrn_40_1", "Wide ResNet of depth 40, width 1.", _wrn, 40, 1)
register("wrn_40_2", "Wide ResNet of depth 40, width 2.", _wrn, 40, 2)
register(
    "resnet18_cifar",
    "ResNet-18 with a 3x3 stem of stride 1 and no max-pooling, for 32x32 images.",
    _resnet18,
)
register(
    "resnet50_cifar",
    "ResNet-50 with a 3x3 stem of stride 1 and no max-pooling, for 32x32 images.",
    _resnet50,
)
register(
    "mobilenetv2_cifar",
    """MobileNetV2 of half width (Sandler et al. 2018), expansion 6, for 32x32 images.

    As in the CRD repository, the stem halves height and width, but the second stage keeps them.
    """,
    _mobilenetv2,
)
