# SPDX-License-Identifier: BSD-3-Clause
"""Shape files: one convolution, transposed convolution or linear layer a line (notation in README.md)."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

_TOKEN = re.compile(r"(n|g|ic|oc|i|k|s|p|d|op)(\d+(?:x\d+)*)")
_SCALARS = ("n", "g", "ic", "oc")
_AXES = ("i", "k", "s", "p", "d", "op")


@dataclass(frozen=True)
class Layer:
    """One problem of a shape file. `size` and `kernel` are empty for a linear layer."""

    name: str
    n: int
    groups: int
    ic: int
    oc: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    kind: str
    note: str
    stated_mflop: float | None

    @property
    def nd(self) -> int:
        return len(self.kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.n, self.ic, *self.size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.transposed:
            return (self.ic, self.oc // self.groups, *self.kernel)
        return (self.oc, self.ic // self.groups, *self.kernel)

    @property
    def output_size(self) -> tuple[int, ...]:
        if self.transposed:
            return tuple(
                (i - 1) * s - 2 * p + d * (k - 1) + op + 1
                for i, k, s, p, d, op in zip(self.size, self.kernel, self.stride, self.padding,
                                             self.dilation, self.output_padding, strict=True))
        return tuple(
            (i + 2 * p - d * (k - 1) - 1) // s + 1
            for i, k, s, p, d in zip(self.size, self.kernel, self.stride, self.padding,
                                     self.dilation, strict=True))

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.n, self.oc, *self.output_size)

    @property
    def terms(self) -> int:
        """Products in the longest sum of one output element (a transposed layer with stride has fewer)."""
        return self.ic // self.groups * math.prod(self.kernel)

    @property
    def flops(self) -> int:
        """Two per multiply-add, taps that fall on padding counted."""
        sites = self.size if self.transposed else self.output_size
        return 2 * self.n * self.oc * self.terms * math.prod(sites)

    @property
    def flops_real(self) -> int:
        """As `flops` without the taps that meet padding (transposed: without what is cropped)."""
        pairs = 1
        for a in range(self.nd):
            i, o = self.size[a], self.output_size[a]
            k, s, p, d = self.kernel[a], self.stride[a], self.padding[a], self.dilation[a]
            # A transposed convolution is a convolution that runs from its output to its input.
            sites, reach = (i, o) if self.transposed else (o, i)
            pairs *= sum(0 <= site * s - p + tap * d < reach
                         for site in range(sites) for tap in range(k))
        return 2 * self.n * self.oc * (self.ic // self.groups) * pairs


def parse_line(line: str) -> Layer | None:
    """Reads one line; None for an empty line or a comment. ValueError says what is wrong with it."""
    text, _, remark = line.partition("#")
    words = text.split()
    if not words:
        return None
    name, fields = words[0], {}
    for word in words[1:]:
        match = _TOKEN.fullmatch(word)
        key = "t" if word == "t" else match[1] if match else None
        if key is None:
            raise ValueError(f"{name}: {word!r} is not one of n g ic oc i k s p d op with numbers, or t")
        if key in fields:
            raise ValueError(f"{name}: {key!r} is given twice")
        fields[key] = True if key == "t" else tuple(int(v) for v in match[2].split("x"))

    for key in ("ic", "oc"):
        if key not in fields:
            raise ValueError(f"{name}: {key!r} is missing")
    for key in _SCALARS:
        if len(fields.setdefault(key, (1,))) != 1:
            raise ValueError(f"{name}: {key!r} takes one number, got {fields[key]}")
    if ("i" in fields) != ("k" in fields):
        raise ValueError(f"{name}: 'i' and 'k' come together (neither of them: a linear layer)")
    nd = len(fields.get("k", ()))
    if nd > 3:
        raise ValueError(f"{name}: at most 3 spatial axes, got {nd}")
    axes = {}
    for key, default in zip(_AXES, (None, None, 1, 0, 1, 0), strict=True):
        values = fields.get(key, (default,) * nd)
        if key == "op" and len(values) == 1:
            values *= nd
        if len(values) != nd:
            raise ValueError(f"{name}: {key!r} has {len(values)} numbers, 'k' has {nd}")
        axes[key] = values
    transposed = "t" in fields
    if "op" in fields and not transposed:
        raise ValueError(f"{name}: 'op' needs 't'")
    groups, ic, oc = fields["g"][0], fields["ic"][0], fields["oc"][0]
    if min(groups, ic, oc, *axes["k"], *axes["s"], *axes["d"]) < 1:
        raise ValueError(f"{name}: channels, groups, kernel, stride and dilation must be positive")
    if ic % groups or oc % groups:
        raise ValueError(f"{name}: {groups} groups do not divide ic {ic} and oc {oc}")

    remarks = [part.strip() for part in remark.split(";")]
    mflop = re.fullmatch(r"([\d.]+) mflop", remarks[-1])
    if mflop:
        remarks.pop()
    layer = Layer(
        name=name, n=fields["n"][0], groups=groups, ic=ic, oc=oc, size=axes["i"], kernel=axes["k"],
        stride=axes["s"], padding=axes["p"], dilation=axes["d"], transposed=transposed,
        output_padding=axes["op"], kind=remarks[0] if remarks else "",
        note="; ".join(remarks[1:]),
        stated_mflop=float(mflop[1]) if mflop else None)
    if min(layer.output_size, default=1) < 1:
        raise ValueError(f"{name}: the output would be empty: {layer.output_shape}")
    return layer


def read_layers(path: Path | str) -> list[Layer]:
    """All layers of a shape file. ValueError with the line number for a bad line or a repeated name."""
    layers: list[Layer] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            layer = parse_line(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if layer is None:
            continue
        if any(layer.name == other.name for other in layers):
            raise ValueError(f"{path}:{number}: {layer.name} occurs twice")
        layers.append(layer)
    return layers
