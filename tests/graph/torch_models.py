# SPDX-License-Identifier: BSD-3-Clause
"""Small versions of well-known convolutional networks, written for these tests on torch.nn.

`MODELS` maps a name to (constructor, input shape). Constructors are called with torch, so that this file can be
imported where torch is not installed. The architectures follow the papers named at each; widths are cut down.
"""

from __future__ import annotations

from typing import Any

MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {}


def _model(name: str, shape: tuple[int, ...]) -> Any:
    def add(build: Any) -> Any:
        MODELS[name] = (build, shape)
        return build

    return add


def build(torch: Any, name: str, *, seed: int = 0, dtype: Any = None, randomise: bool = True) -> Any:
    """A model in eval mode whose BatchNorms are far from their defaults."""
    torch.manual_seed(seed)
    model = MODELS[name][0](torch)
    if randomise:
        randomise_norms(torch, model, seed)
    return model.to(dtype or torch.float32).eval()


def randomise_norms(torch: Any, model: Any, seed: int = 0) -> None:
    """Statistics and affine parameters of every BatchNorm far from 0 and 1, signs mixed, activations kept in range.

    A forward in training mode gives each BatchNorm the statistics of its own input first, so that the output of deep
    models neither dies nor explodes; what is then drawn moves them well away from that again.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    shape = next(s for build, s in MODELS.values() if build is getattr(model, "built_by", None))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    model.train()
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn((4, *shape[1:]), generator=generator))
        for norm in norms:
            norm.momentum = 0.1
            norm.eps = 1e-3 if norm.num_features % 2 else 1e-5

            def draw(low: float, high: float, size: int = norm.num_features) -> Any:
                return torch.rand(size, generator=generator) * (high - low) + low

            sigma = norm.running_var.sqrt()
            norm.running_mean += sigma * draw(-1.5, 1.5)
            norm.running_var *= draw(0.2, 4.0)
            norm.running_var += 1e-3
            if norm.weight is not None:
                sign = torch.where(torch.rand(norm.num_features, generator=generator) < 0.3, -1.0, 1.0)
                norm.weight.copy_(draw(0.4, 2.5) * sign)
                norm.bias.copy_(draw(-1.0, 1.0))
    model.eval()


def _finish(model: Any, build: Any) -> Any:
    model.built_by = build
    return model


# -- He et al., arXiv 1512.03385 -------------------------------------------------------------------------------------
def _residual(torch: Any, planes: tuple[int, ...], stride: int, kernels: tuple[int, ...], groups: int = 1) -> Any:
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = len(kernels)
            for i, k in enumerate(kernels, 1):
                s = stride if k == 3 and i == (1 if self.steps == 2 else 2) else 1
                g = groups if k == 3 else 1
                setattr(self, f"conv{i}", nn.Conv2d(planes[i - 1], planes[i], k, s, k // 2, groups=g, bias=False))
                setattr(self, f"bn{i}", nn.BatchNorm2d(planes[i]))
            self.relu = nn.ReLU(inplace=True)
            self.downsample = None
            if stride != 1 or planes[0] != planes[-1]:
                self.downsample = nn.Sequential(
                    nn.Conv2d(planes[0], planes[-1], 1, stride, bias=False), nn.BatchNorm2d(planes[-1])
                )

        def forward(self, x: Any) -> Any:
            identity = x if self.downsample is None else self.downsample(x)
            out = x
            for i in range(1, self.steps + 1):
                out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
                if i < self.steps:
                    out = self.relu(out)
            out += identity
            return self.relu(out)

    return Block()


def _resnet(torch: Any, blocks: list[Any], width: int, features: int) -> Any:
    nn = torch.nn

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            self.layers = nn.Sequential(*blocks)
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.fc = nn.Linear(features, 5)

        def forward(self, x: Any) -> Any:
            x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
            return self.fc(torch.flatten(self.avgpool(x), 1))

    return ResNet()


@_model("resnet_basic", (2, 3, 33, 40))
def resnet_basic(torch: Any) -> Any:
    blocks = [
        _residual(torch, (8, 8, 8), 1, (3, 3)), _residual(torch, (8, 12, 12), 2, (3, 3)),
        _residual(torch, (12, 12, 12), 1, (3, 3)),
    ]
    return _finish(_resnet(torch, blocks, 8, 12), resnet_basic)


@_model("resnet_bottleneck", (2, 3, 32, 32))
def resnet_bottleneck(torch: Any) -> Any:
    blocks = [_residual(torch, (8, 6, 6, 16), 1, (1, 3, 1)), _residual(torch, (16, 6, 6, 16), 2, (1, 3, 1))]
    return _finish(_resnet(torch, blocks, 8, 16), resnet_bottleneck)


@_model("resnext", (2, 3, 32, 32))  # Xie et al., arXiv 1611.05431: grouped 3x3
def resnext(torch: Any) -> Any:
    blocks = [
        _residual(torch, (8, 16, 16, 16), 1, (1, 3, 1), groups=4),
        _residual(torch, (16, 24, 24, 24), 2, (1, 3, 1), groups=8),
    ]
    return _finish(_resnet(torch, blocks, 8, 24), resnext)


# -- Sandler et al., arXiv 1801.04381 --------------------------------------------------------------------------------
@_model("mobilenet_v2", (2, 3, 32, 32))
def mobilenet_v2(torch: Any) -> Any:
    nn = torch.nn

    class ConvNormActivation(nn.Sequential):
        def __init__(self, inp: int, oup: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
            super().__init__(
                nn.Conv2d(inp, oup, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False), nn.BatchNorm2d(oup),
                nn.ReLU6(inplace=True),
            )

    class InvertedResidual(nn.Module):
        def __init__(self, inp: int, oup: int, stride: int, expand: int) -> None:
            super().__init__()
            hidden = inp * expand
            layers = [ConvNormActivation(inp, hidden, 1)] if expand != 1 else []
            layers += [
                ConvNormActivation(hidden, hidden, 3, stride, groups=hidden), nn.Conv2d(hidden, oup, 1, bias=False),
                nn.BatchNorm2d(oup),
            ]
            self.conv = nn.Sequential(*layers)
            self.use_res_connect = stride == 1 and inp == oup

        def forward(self, x: Any) -> Any:
            return x + self.conv(x) if self.use_res_connect else self.conv(x)

    class MobileNetV2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                ConvNormActivation(3, 8, stride=2), InvertedResidual(8, 6, 1, 1), InvertedResidual(6, 8, 2, 4),
                InvertedResidual(8, 8, 1, 4), ConvNormActivation(8, 24, 1),
            )
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 5))

        def forward(self, x: Any) -> Any:
            x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
            return self.classifier(x.reshape(x.shape[0], -1))

    return _finish(MobileNetV2(), mobilenet_v2)


# -- Huang et al., arXiv 1608.06993: BatchNorm before the convolution ------------------------------------------------
@_model("densenet", (2, 3, 32, 32))
def densenet(torch: Any) -> Any:
    nn = torch.nn

    class DenseLayer(nn.Module):
        def __init__(self, inp: int, growth: int) -> None:
            super().__init__()
            self.norm1 = nn.BatchNorm2d(inp)
            self.relu1 = nn.ReLU(inplace=True)
            self.conv1 = nn.Conv2d(inp, 2 * growth, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(2 * growth)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

        def forward(self, features: Any) -> Any:
            bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
            return self.conv2(self.relu2(self.norm2(bottleneck)))

    class DenseNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv0 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
            self.norm0 = nn.BatchNorm2d(8)
            self.pool0 = nn.MaxPool2d(3, 2, 1)
            self.layers = nn.ModuleList([DenseLayer(8 + 4 * i, 4) for i in range(3)])
            self.norm5 = nn.BatchNorm2d(20)
            self.classifier = nn.Linear(20, 5)

        def forward(self, x: Any) -> Any:
            F = nn.functional
            features = [self.pool0(F.relu(self.norm0(self.conv0(x)), inplace=True))]
            for layer in self.layers:
                features.append(layer(features))
            out = F.relu(self.norm5(torch.cat(features, 1)), inplace=True)
            return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))

    return _finish(DenseNet(), densenet)


# -- Szegedy et al., arXiv 1512.00567: factorised 1x7 and 7x1, branches ----------------------------------------------
@_model("inception", (2, 3, 24, 21))
def inception(torch: Any) -> Any:
    nn = torch.nn

    class BasicConv2d(nn.Module):
        def __init__(self, inp: int, oup: int, **kwargs: Any) -> None:
            super().__init__()
            self.conv = nn.Conv2d(inp, oup, bias=False, **kwargs)
            self.bn = nn.BatchNorm2d(oup, eps=0.001)

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(self.bn(self.conv(x)), inplace=True)

    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = BasicConv2d(3, 8, kernel_size=3, stride=2)
            self.branch1x1 = BasicConv2d(8, 6, kernel_size=1)
            self.branch7x7_1 = BasicConv2d(8, 4, kernel_size=1)
            self.branch7x7_2 = BasicConv2d(4, 5, kernel_size=(1, 7), padding=(0, 3))
            self.branch7x7_3 = BasicConv2d(5, 6, kernel_size=(7, 1), padding=(3, 0))
            self.branch3x3 = BasicConv2d(8, 4, kernel_size=3, stride=1, padding="same")
            self.branch_pool = BasicConv2d(8, 6, kernel_size=1)
            self.reduce = BasicConv2d(22, 7, kernel_size=3, stride=2)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            pooled = nn.functional.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
            deep = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
            outputs = [self.branch1x1(x), deep, self.branch3x3(x), self.branch_pool(pooled)]
            x = torch.cat(outputs, dim=1)
            return torch.cat([self.reduce(x), nn.functional.max_pool2d(x, kernel_size=3, stride=2)], 1).mean((2, 3))

    return _finish(Inception(), inception)


# -- Ronneberger et al., arXiv 1505.04597 ----------------------------------------------------------------------------
@_model("unet", (1, 1, 20, 28))
def unet(torch: Any) -> Any:
    nn = torch.nn

    def double(inp: int, oup: int) -> Any:
        return nn.Sequential(
            nn.Conv2d(inp, oup, 3, padding=1), nn.BatchNorm2d(oup), nn.ReLU(inplace=True),
            nn.Conv2d(oup, oup, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(oup),
            nn.LeakyReLU(0.1, inplace=True),
        )

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2, self.bottom = double(1, 6), double(6, 8), double(8, 12)
            self.pool = nn.MaxPool2d(2)
            self.up2 = nn.ConvTranspose2d(12, 8, 2, stride=2)
            self.norm2 = nn.BatchNorm2d(8)
            self.conv2 = double(16, 8)
            self.up1 = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv1 = double(14, 6)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x: Any) -> Any:
            d1 = self.down1(x)
            d2 = self.down2(self.pool(d1))
            x = self.bottom(self.pool(d2))
            x = self.conv2(torch.cat([d2, self.norm2(self.up2(x))], dim=1))
            x = self.conv1(torch.cat([self.up1(x), d1], dim=1))
            coarse = nn.functional.interpolate(x, size=(5, 7), mode="nearest")
            return torch.sigmoid(self.head(x)), nn.functional.softmax(self.head(coarse), dim=1)

    return _finish(UNet(), unet)


def model_of(torch: Any, source: str, training: bool = False) -> Any:
    """A module whose forward(x) returns the value of an expression in self, x, torch and F."""
    class Expression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(7)
            self.w = torch.nn.Parameter(torch.randn(4, 4, 3, 3, generator=generator))
            self.b = torch.nn.Parameter(torch.randn(4, generator=generator))
            self.register_buffer("v", torch.rand(4, generator=generator) + 0.5)
            self.m = torch.nn.Parameter(torch.randn(5, 6, generator=generator))

    names = {"torch": torch, "F": torch.nn.functional}
    exec(f"def forward(self, x):\n    return {source}\n", names)
    Expression.forward = names["forward"]
    return Expression().train(training)


import torch_models_more  # noqa: E402, F401  (registers the others)
