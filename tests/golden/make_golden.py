# SPDX-License-Identifier: BSD-3-Clause
"""Writes golden.npz: inputs and PyTorch's results, so that the comparison also runs where torch is not installed.

    python tests/golden/make_golden.py        (needs torch; the stored file says which version made it)

Every case is a dict of arrays `<case>/<argument>` plus a JSON entry with the operator's name and its other
arguments. The results are torch's in float64, so that they serve every dtype.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

GENERATOR = torch.Generator().manual_seed(2026)


def exact(tensor):
    """Values that float32 holds exactly, so that the stored inputs are the ones torch saw."""
    return tensor.float().double()


def normal(*shape):
    return exact(torch.randn(*shape, generator=GENERATOR, dtype=torch.float64))


def cases():
    conv = [
        ("conv1d", (2, 4, 17), (6, 2, 5), dict(stride=2, padding=3, dilation=2, groups=2)),
        ("conv1d", (1, 3, 9), (4, 3, 4), dict(padding="same")),
        ("conv2d", (2, 3, 9, 8), (8, 3, 3, 3), dict(padding=1)),
        ("conv2d", (1, 8, 7, 7), (8, 1, 3, 3), dict(padding=1, groups=8)),
        ("conv2d", (2, 6, 8, 9), (9, 2, 3, 2), dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=3)),
        ("conv2d", (1, 16, 7, 7), (24, 16, 1, 1), dict()),
        ("conv2d", (1, 5, 6, 6), (7, 5, 1, 1), dict(stride=2)),
        ("conv3d", (1, 3, 5, 6, 7), (4, 3, 3, 3, 3), dict(stride=(1, 2, 2), padding=1)),
        ("conv3d", (1, 4, 4, 4, 5), (4, 1, 2, 3, 3), dict(groups=4, padding=(0, 1, 1))),
        ("conv_transpose1d", (2, 4, 7), (4, 3, 5), dict(stride=3, padding=1, output_padding=2, groups=2)),
        ("conv_transpose2d", (1, 6, 5, 4), (6, 4, 4, 4), dict(stride=2, padding=1)),
        ("conv_transpose2d", (1, 4, 3, 4), (4, 2, 3, 3), dict(stride=2, padding=1, output_padding=1, groups=4, dilation=2)),
        ("conv_transpose3d", (1, 2, 3, 3, 3), (2, 3, 2, 3, 2), dict(stride=2)),
        ("linear", (5, 12), (7, 12), dict()),
        ("linear", (2, 3, 12), (7, 12), dict()),
    ]
    for name, x_shape, w_shape, kwargs in conv:
        x, w = normal(*x_shape), normal(*w_shape)
        outputs = w_shape[1] * kwargs.get("groups", 1) if "transpose" in name else w_shape[0]
        bias = normal(outputs)
        yield name, dict(input=x, weight=w, bias=bias), kwargs, getattr(F, name)(x, w, bias, **kwargs)
    x = normal(3, 5, 6, 4)
    bn = dict(running_mean=normal(5), running_var=exact(normal(5).abs() + 0.1), weight=normal(5), bias=normal(5))
    yield "batch_norm", dict(input=x, **bn), dict(eps=1e-3), F.batch_norm(x, *bn.values(), eps=1e-3)
    yield "max_pool2d", dict(input=x), dict(kernel_size=3, stride=2, padding=1, ceil_mode=True), F.max_pool2d(
        x, 3, 2, 1, ceil_mode=True)
    yield "avg_pool2d", dict(input=x), dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), (
        F.avg_pool2d(x, 3, 2, 1, True, False))
    yield "adaptive_avg_pool2d", dict(input=x), dict(output_size=[4, 3]), F.adaptive_avg_pool2d(x, [4, 3])
    for mode in ("reflect", "replicate", "circular"):
        yield "pad", dict(input=x), dict(pad=[1, 2, 3, 0], mode=mode), F.pad(x, [1, 2, 3, 0], mode=mode)
    yield "pad", dict(input=x), dict(pad=[1, -1, 2, 0], value=1.5), F.pad(x, [1, -1, 2, 0], value=1.5)
    yield "interpolate", dict(input=x), dict(size=[9, 7]), F.interpolate(x, [9, 7])
    for align in (False, True):
        keywords = dict(scale_factor=2.0, mode="bilinear", align_corners=align)
        yield "interpolate", dict(input=x), keywords, F.interpolate(x, **keywords)
    wide = exact(3 * x)
    for name in ("relu", "relu6", "leaky_relu", "sigmoid", "hardtanh", "hardswish", "silu", "gelu"):
        yield name, dict(input=wide), {}, getattr(F, name)(wide)
    yield "softmax", dict(input=wide), dict(dim=1), F.softmax(wide, 1)


def main():
    arrays, index = {}, []
    for i, (name, tensors, kwargs, result) in enumerate(cases()):
        for argument, tensor in tensors.items():
            arrays[f"{i}/{argument}"] = tensor.numpy().astype(np.float32)
        arrays[f"{i}/result"] = result.numpy()
        index.append({"op": name, "tensors": list(tensors), "kwargs": kwargs})
    arrays["index"] = np.array(json.dumps({"torch": torch.__version__, "cases": index}))
    path = Path(__file__).with_name("golden.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {len(index)} cases, {path.stat().st_size} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
