# SPDX-License-Identifier: BSD-3-Clause
"""A small layered layout for directed graphs, after Sugiyama, Tagawa and Toda 1981.

Longest-path layers, bend points where an edge crosses a layer, a few barycentre sweeps against
crossings, then positions by least squares in every layer. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Drawn", "assign_layers", "place"]

_SWEEPS = 6
_PASSES = 9
_GAP = 22.0  # between two boxes of a layer
_BEND_GAP = 9.0  # around an edge that only passes
#: More bend points than this are not worth a good drawing; long edges go straight then.
_MAX_BENDS = 4000


@dataclass
class Drawn:
    """Where everything went: centre and top of each box, and the points of each edge.

    `paths[i]` has the points (x, y) of edge i: bottom of its source and bottom of the source's layer, then top and
    bottom of each layer passed, then the top of its target. So straight pieces and bent ones alternate.
    """

    x: list[float]
    y: list[float]
    paths: list[list[tuple[float, float]]]
    width: float
    height: float


def assign_layers(
    count: int, edges: Sequence[tuple[int, int]], at_least: Mapping[int, int] | None = None
) -> list[int]:
    """Layer of each of `count` boxes: below everything it reads, not above `at_least`.

    Edges (source, target) must have source < target; others are ignored. A box that reads nothing
    moves down to its first reader.
    """
    layers = [0] * count
    readers: list[list[int]] = [[] for _ in range(count)]
    has_input = [False] * count
    for source, target in edges:
        if source < target:
            readers[source].append(target)
            has_input[target] = True
    for box in range(count):
        if at_least is not None:
            layers[box] = max(layers[box], at_least.get(box, 0))
        for reader in readers[box]:
            layers[reader] = max(layers[reader], layers[box] + 1)
    for box in range(count):
        if not has_input[box] and readers[box]:
            layers[box] = min(layers[reader] for reader in readers[box]) - 1
    return layers


def _least_squares(wanted: list[float], gaps: list[float], weights: list[float]) -> list[float]:
    """Positions nearest to `wanted` (weighted squares) with x[i+1] - x[i] >= gaps[i].

    Pool adjacent violators: subtract the gaps, regress to a growing sequence, add them again.
    """
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    blocks: list[list[float]] = []  # mean, weight, number of positions
    for value, offset, weight in zip(wanted, offsets, weights, strict=True):
        blocks.append([value - offset, weight, 1.0])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, total, size = blocks.pop()
            last = blocks[-1]
            last[0] = (last[0] * last[1] + mean * total) / (last[1] + total)
            last[1] += total
            last[2] += size
    means = [mean for mean, _, size in blocks for _ in range(int(size))]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def _crossings(order: list[list[int]], below: list[list[int]], position: list[int]) -> int:
    """Number of edge crossings between neighbouring layers (merge counting)."""
    total = 0
    for row in order:
        ends = [position[target] for point in row for target in sorted(below[point], key=position.__getitem__)]
        seen: list[int] = []
        for end in ends:
            low, high = 0, len(seen)
            while low < high:
                middle = (low + high) // 2
                if seen[middle] <= end:
                    low = middle + 1
                else:
                    high = middle
            total += len(seen) - low
            seen.insert(low, end)
    return total


def _sweep(order: list[list[int]], above: list[list[int]], below: list[list[int]]) -> list[list[int]]:
    """Orders each layer by the mean position of its neighbours, down and up; the best order seen."""
    position = [0] * len(above)

    def number(row: list[int]) -> None:
        for index, point in enumerate(row):
            position[point] = index

    for row in order:
        number(row)
    best, fewest = [list(row) for row in order], _crossings(order, below, position)
    for sweep in range(_SWEEPS):
        if fewest == 0:
            break
        down = sweep % 2 == 0
        neighbours = above if down else below
        for row in order if down else reversed(order):
            centre = {
                p: sum(position[q] for q in neighbours[p]) / len(neighbours[p]) if neighbours[p] else position[p]
                for p in row
            }
            row.sort(key=centre.__getitem__)  # stable: equal means keep their order
            number(row)
        crossings = _crossings(order, below, position)
        if crossings < fewest:
            best, fewest = [list(row) for row in order], crossings
    return best


def place(
    sizes: Sequence[tuple[float, float]],
    edges: Sequence[tuple[int, int]],
    layers: Sequence[int],
    heights: Sequence[float],
    *,
    layer_gap: float,
) -> Drawn:
    """Places boxes of `sizes` (width, height) in their `layers`; layer i is `heights[i]` high.

    Every edge must lead to a later layer. Boxes start at the top of their layer.
    """
    count = len(sizes)
    tops = [0.0]
    for height in heights:
        tops.append(tops[-1] + height + layer_gap)
    # Points: boxes first, then the bends of long edges.
    layer_of = list(layers)
    chains: list[list[int]] = []
    bends = sum(layers[target] - layers[source] - 1 for source, target in edges)
    for source, target in edges:
        chain = [source]
        if bends <= _MAX_BENDS:
            for layer in range(layers[source] + 1, layers[target]):
                chain.append(len(layer_of))
                layer_of.append(layer)
        chains.append([*chain, target])
    above: list[list[int]] = [[] for _ in layer_of]
    below: list[list[int]] = [[] for _ in layer_of]
    for chain in chains:
        for upper, lower in zip(chain, chain[1:]):
            if layer_of[lower] == layer_of[upper] + 1:
                above[lower].append(upper)
                below[upper].append(lower)
    order: list[list[int]] = [[] for _ in heights]
    for point, layer in enumerate(layer_of):
        order[layer].append(point)
    order = _sweep(order, above, below)

    width = [size[0] for size in sizes] + [0.0] * (len(layer_of) - count)
    x = [0.0] * len(layer_of)
    gaps = {}
    for index, row in enumerate(order):
        between = []
        for left, right in zip(row, row[1:]):
            gap = _GAP if left < count and right < count else _GAP / 2 + _BEND_GAP
            between.append((width[left] + width[right]) / 2 + gap)
        gaps[index] = between
        start = -sum(between) / 2
        for point, step in zip(row, [*between, 0.0]):
            x[point] = start
            start += step
    for turn in range(_PASSES):
        # Down, each box below what it reads; up, above what reads it; down last, so that chains are straight.
        down = turn % 2 == 0
        for index in range(len(order)) if down else reversed(range(len(order))):
            row, wanted, weights = order[index], [], []
            for point in row:
                near = above[point] if down else below[point]
                wanted.append(sum(x[q] for q in near) / len(near) if near else x[point])
                weights.append(1.0 if point < count else 4.0)  # bends pull harder: long edges come out straight
            for point, value in zip(row, _least_squares(wanted, gaps[index], weights), strict=True):
                x[point] = value

    leftmost = min((x[p] - width[p] / 2 for p in range(len(x))), default=0.0)
    x = [value - leftmost for value in x]
    paths = []
    for chain in chains:
        source, target = chain[0], chain[-1]
        at = layers[source]
        points = [(x[source], tops[at] + sizes[source][1]), (x[source], tops[at] + heights[at])]
        for bend in chain[1:-1]:
            top = tops[layer_of[bend]]
            points += [(x[bend], top), (x[bend], top + heights[layer_of[bend]])]
        paths.append([*points, (x[target], tops[layers[target]])])
    return Drawn(
        x=x[:count],
        y=[tops[at] for at in layers],
        paths=paths,
        width=max((x[p] + width[p] / 2 for p in range(len(x))), default=0.0),
        height=max(0.0, tops[-1] - layer_gap),
    )
