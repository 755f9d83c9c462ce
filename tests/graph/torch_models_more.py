# SPDX-License-Identifier: BSD-3-Clause
"""The second half of torch_models: imported by it."""

from __future__ import annotations

from typing import Any

from torch_models import _finish, _model


# -- Ma et al., arXiv 1807.11164 -------------------------------------------------------------------------------------
@_model("shufflenet_v2", (2, 3, 32, 32))
def shufflenet_v2(torch: Any) -> Any:
    nn = torch.nn

    def channel_shuffle(x: Any, groups: int) -> Any:
        batch, channels, height, width = x.size()
        x = x.view(batch, groups, channels // groups, height, width)
        return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)

    class Unit(nn.Module):
        def __init__(self, inp: int, oup: int, stride: int) -> None:
            super().__init__()
            self.stride = stride
            half = oup // 2
            self.branch1 = nn.Sequential()
            if stride > 1:
                self.branch1 = nn.Sequential(
                    nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False), nn.BatchNorm2d(inp),
                    nn.Conv2d(inp, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
                )
            start = inp if stride > 1 else half
            self.branch2 = nn.Sequential(
                nn.Conv2d(start, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
                nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False), nn.BatchNorm2d(half),
                nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            )

        def forward(self, x: Any) -> Any:
            if self.stride == 1:
                x1, x2 = x.chunk(2, dim=1)
                out = torch.cat((x1, self.branch2(x2)), dim=1)
            else:
                out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
            return channel_shuffle(out, 2)

    class ShuffleNetV2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            self.stage = nn.Sequential(Unit(8, 16, 2), Unit(16, 16, 1), Unit(16, 16, 1))
            self.fc = nn.Linear(16, 5)

        def forward(self, x: Any) -> Any:
            return self.fc(self.stage(self.conv1(x)).mean([2, 3]))

    return _finish(ShuffleNetV2(), shufflenet_v2)


# -- Tran et al., arXiv 1711.11248: 3-D convolutions, one of them split in space and time ----------------------------
@_model("r3d", (1, 3, 6, 14, 14))
def r3d(torch: Any) -> Any:
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Sequential(
                nn.Conv3d(6, 8, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(8), nn.ReLU(inplace=True)
            )
            self.conv2 = nn.Sequential(
                nn.Conv3d(8, 10, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(10), nn.ReLU(inplace=True),
                nn.Conv3d(10, 8, (3, 1, 1), padding=(1, 0, 0), bias=False), nn.BatchNorm3d(8),
            )
            self.relu = nn.ReLU(inplace=True)
            self.downsample = nn.Sequential(nn.Conv3d(6, 8, 1, (1, 2, 2), bias=False), nn.BatchNorm3d(8))

        def forward(self, x: Any) -> Any:
            return self.relu(self.conv2(self.conv1(x)) + self.downsample(x))

    class VideoResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(
                nn.Conv3d(3, 6, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(6), nn.ReLU(inplace=True)
            )
            self.layer = Block()
            self.avgpool = nn.AdaptiveAvgPool3d((1, 1, 1))
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Any) -> Any:
            return self.fc(self.avgpool(self.layer(self.stem(x))).flatten(1))

    return _finish(VideoResNet(), r3d)


# -- van den Oord et al., arXiv 1609.03499: dilated, causal, gated ---------------------------------------------------
@_model("wavenet", (2, 2, 40))
def wavenet(torch: Any) -> Any:
    nn = torch.nn

    class Gated(nn.Module):
        def __init__(self, channels: int, dilation: int) -> None:
            super().__init__()
            self.dilation = dilation
            self.filter = nn.Conv1d(channels, channels, 2, dilation=dilation)
            self.filter_bn = nn.BatchNorm1d(channels)
            self.gate = nn.Conv1d(channels, channels, 2, dilation=dilation)
            self.gate_bn = nn.BatchNorm1d(channels)
            self.mix = nn.Conv1d(channels, 2 * channels, 1)

        def forward(self, x: Any) -> Any:
            padded = nn.functional.pad(x, (self.dilation, 0))
            gated = torch.tanh(self.filter_bn(self.filter(padded))) * self.gate_bn(self.gate(padded)).sigmoid()
            residual, skip = torch.split(self.mix(gated), x.size(1), dim=1)
            return x + residual, skip

    class WaveNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Conv1d(2, 6, 1)
            self.layers = nn.ModuleList([Gated(6, 2**i) for i in range(4)])
            self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 3, 1))

        def forward(self, x: Any) -> Any:
            x = self.start(x)
            skips = 0
            for layer in self.layers:
                x, skip = layer(x)
                skips = skips + skip
            return nn.functional.log_softmax(self.end(skips), dim=1)

    return _finish(WaveNet(), wavenet)


# -- Radford et al., arXiv 1511.06434 --------------------------------------------------------------------------------
@_model("dcgan", (2, 10, 1, 1))
def dcgan(torch: Any) -> Any:
    nn = torch.nn

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = nn.Sequential(
                nn.ConvTranspose2d(10, 16, 4, 1, 0, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
                nn.ConvTranspose2d(16, 12, 4, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(True),
                nn.ConvTranspose2d(12, 8, 3, 2, 1, output_padding=1, groups=4), nn.BatchNorm2d(8), nn.ReLU(True),
                nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh(),
            )

        def forward(self, z: Any) -> Any:
            return self.main(z)

    return _finish(Generator(), dcgan)


# -- Iandola et al., arXiv 1602.07360, with BatchNorm ----------------------------------------------------------------
@_model("squeezenet", (2, 3, 35, 35))
def squeezenet(torch: Any) -> Any:
    nn = torch.nn

    class Fire(nn.Module):
        def __init__(self, inp: int, squeeze: int, expand: int) -> None:
            super().__init__()
            self.squeeze = nn.Conv2d(inp, squeeze, 1)
            self.squeeze_bn = nn.BatchNorm2d(squeeze)
            self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
            self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
            self.expand_bn = nn.BatchNorm2d(2 * expand)
            self.activation = nn.ReLU(inplace=True)

        def forward(self, x: Any) -> Any:
            x = self.activation(self.squeeze_bn(self.squeeze(x)))
            x = torch.cat([self.expand1x1(x), self.expand3x3(x)], 1)
            return self.activation(self.expand_bn(x))

    class SqueezeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(8, 4, 6),
                Fire(12, 4, 8), nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            )
            self.classifier = nn.Sequential(nn.Dropout(p=0.5), nn.Conv2d(16, 5, 1), nn.ReLU(inplace=True))

        def forward(self, x: Any) -> Any:
            x = self.classifier(self.features(x))
            return nn.functional.avg_pool2d(x, 2, ceil_mode=True).mean(3).mean(2)

    return _finish(SqueezeNet(), squeezenet)


# -- Tan and Le, arXiv 1905.11946: squeeze and excitation, SiLU ------------------------------------------------------
@_model("efficientnet", (2, 3, 32, 32))
def efficientnet(torch: Any) -> Any:
    nn = torch.nn

    class SqueezeExcitation(nn.Module):
        def __init__(self, channels: int, squeeze: int) -> None:
            super().__init__()
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc1 = nn.Conv2d(channels, squeeze, 1)
            self.fc2 = nn.Conv2d(squeeze, channels, 1)
            self.activation = nn.SiLU(inplace=True)
            self.scale_activation = nn.Sigmoid()

        def forward(self, x: Any) -> Any:
            return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x

    class MBConv(nn.Module):
        def __init__(self, inp: int, oup: int, expand: int, kernel: int, stride: int) -> None:
            super().__init__()
            hidden = inp * expand
            self.block = nn.Sequential(
                nn.Sequential(
                    nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden, 0.001), nn.SiLU(inplace=True)
                ),
                nn.Sequential(
                    nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
                    nn.BatchNorm2d(hidden, 0.001), nn.SiLU(inplace=True),
                ),
                SqueezeExcitation(hidden, 2),
                nn.Sequential(nn.Conv2d(hidden, oup, 1, bias=False), nn.BatchNorm2d(oup, 0.001)),
            )
            self.residual = stride == 1 and inp == oup

        def forward(self, x: Any) -> Any:
            result = self.block(x)
            if self.residual:
                result += x
            return result

    class EfficientNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8, 0.001), nn.SiLU(inplace=True)
            )
            self.blocks = nn.Sequential(MBConv(8, 6, 2, 3, 1), MBConv(6, 6, 3, 5, 1), MBConv(6, 8, 3, 3, 2))
            self.head = nn.Sequential(
                nn.Conv2d(8, 20, 1, bias=False), nn.BatchNorm2d(20, 0.001), nn.Hardswish(inplace=True)
            )
            self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(20, 5))

        def forward(self, x: Any) -> Any:
            x = self.head(self.blocks(self.stem(x)))
            return self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))

    return _finish(EfficientNet(), efficientnet)


@_model("mlp", (7, 12))
def mlp(torch: Any) -> Any:
    nn = torch.nn
    return _finish(
        nn.Sequential(
            nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16, bias=False),
            nn.BatchNorm1d(16, affine=False), nn.GELU(), nn.Linear(16, 3), nn.Softmax(dim=-1),
        ),
        mlp,
    )


# -- everything written as functions, parameters read as attributes --------------------------------------------------
@_model("functional", (2, 4, 11, 9))
def functional(torch: Any) -> Any:
    nn, F = torch.nn, torch.nn.functional

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3)
            self.norm = nn.BatchNorm2d(6)
            self.weight = nn.Parameter(torch.randn(6, 8, 3, 3) / 7)
            self.register_buffer("offset", torch.randn(1, 8, 1, 1))
            self.norm2 = nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            c, n, m = self.conv, self.norm, self.norm2
            y = F.conv2d(x, c.weight, bias=c.bias, padding=(1, 1))
            y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)
            y = torch.relu(y)
            y = F.conv_transpose2d(y, self.weight, None, stride=2, output_padding=1)
            y = F.batch_norm(
                y, weight=m.weight, bias=m.bias, running_mean=m.running_mean, running_var=m.running_var, eps=m.eps
            )
            y = torch.add(y, self.offset, alpha=0.5)
            y = F.leaky_relu(y, 0.2, inplace=True)
            y = F.dropout(y, 0.3, training=False)
            z = y.permute(0, 2, 3, 1).flatten(start_dim=1, end_dim=2).transpose(-1, -2)
            z = z.unsqueeze(1).squeeze(1).mean(dim=-1)
            return torch.stack([F.linear(z, self.fc.weight, self.fc.bias), -z.clamp(min=-1, max=1)], dim=1).sum(1)

    return _finish(Functional(), functional)
