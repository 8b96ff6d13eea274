"""Fig. 2: structures drawn from the networks themselves, as graphs of their `forward`.

`graph` runs a network once and records its convolutions and sums; like the paper, it leaves out activations and
BatchNorm. Convolutions that share a weight have one colour. Outputs with a loss in training are light blue.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, Rectangle
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from drrn.networks import build

# The panels of the paper's Fig. 2, six convolutions on the longest path of each.
PANELS: dict[str, dict[str, Any]] = {
    "(a) ResNet": {"network": "resnet", "U": 2, "features": 2},
    "(b) VDSR": {"B": 5, "U": 0, "features": 2},
    "(c) DRCN": {"network": "drcn", "T": 2, "features": 2},
    "(d) DRRN": {"B": 1, "U": 2, "features": 2},
}
SHARED = ("#a6dba0", "#f4a582", "#c2a5cf", "#fee08b")  # a colour for each weight that is used more than once
ALONE, SUPERVISED, LINE = "#e8e8e8", "#b3d9f2", "#222222"
CONVOLUTIONS = {"conv2d", "conv_transpose2d"}
SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__"}


@dataclass(eq=False)
class Node:
    """The input, a convolution, a sum or an output."""

    kind: str  # "x", "conv", "sum"
    inputs: list[Node] = field(default_factory=list)
    weight: int | None = None  # id of a convolution's weight
    supervised: bool = False
    rank: int = 0  # steps from the input on the longest path
    column: int = 0

    @property
    def place(self) -> tuple[float, float]:
        return 1.3 * self.column, -float(self.rank)


class Recorder(TorchFunctionMode):
    """Records the node of every tensor that the functions called by a network return."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.nodes = [Node("x")]
        self.made_by: dict[int, Node] = {id(x): self.nodes[0]}
        self.alive: list[Any] = [x]  # so that no id is reused

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [tensor for arg in args for tensor in (arg if isinstance(arg, list | tuple) else [arg])]
        sources = [self.made_by[id(tensor)] for tensor in given if id(tensor) in self.made_by]
        if not isinstance(result, Tensor) or not sources:
            return result
        name, node = getattr(function, "__name__", ""), sources[0]  # a norm or the like keeps its input's
        if name in CONVOLUTIONS:
            node = Node("conv", sources[:1], id(args[1]))
        elif name in SUMS and len(sources) > 1:
            node = Node("sum", sources)
        elif name in ("cat", "stack"):  # DRCN's output in training: each part has a loss
            for source in sources:
                source.supervised = True
        if node not in self.nodes:
            self.nodes.append(node)
        self.made_by[id(result)] = node
        self.alive.append(result)
        return result


def graph(network: nn.Module) -> list[Node]:
    """The nodes of a network's `forward` in training, in the order of execution, each with its place."""
    x = torch.rand(2, 1, 16, 16)
    with torch.no_grad(), Recorder(x) as recorder:
        y = network.train()(x)
    recorder.made_by[id(y)].supervised = True
    taken = set()
    for node in recorder.nodes[1:]:
        node.rank = 1 + max(source.rank for source in node.inputs)
        node.column = node.inputs[0].column  # the same as above it, or the next that is free
        while node.place in taken:
            node.column += 1
        taken.add(node.place)
    return recorder.nodes


def fig2(stacked: bool = False) -> Figure:
    """The paper's four structures side by side; two by two on a narrow screen."""
    figure = Figure(figsize=(4.3, 10.4) if stacked else (9.6, 5.4), dpi=160)
    FigureCanvasAgg(figure)
    graphs = {name: graph(build(structure)) for name, structure in PANELS.items()}
    deepest = max(node.rank for nodes in graphs.values() for node in nodes)
    widths = [right - left for left, right in map(extent, graphs.values())]
    axes = figure.subplots(2, 2) if stacked else figure.subplots(1, 4, width_ratios=widths)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.07, wspace=0.02, hspace=0.08)
    for axis, (name, nodes) in zip(axes.flat, graphs.items(), strict=True):
        draw(axis, name, nodes, deepest)
    words = [
        "one colour: one weight, used again · blue: supervised",
        "⊕: sum · left out: activations, BatchNorm, DRCN's w",
    ]
    figure.text(0.5, 0.02, ("\n" if stacked else " · ").join(words), ha="center", size=7.5, color="#333333")
    return figure


def draw(axis: Axes, name: str, nodes: list[Node], deepest: int) -> None:
    """One network from its input at the top to its output at the bottom."""
    uses = Counter(node.weight for node in nodes if node.weight is not None)
    colours = dict(zip([weight for weight, number in uses.items() if number > 1], SHARED * len(uses), strict=False))
    shapes: dict[int, Patch] = {}
    for node in nodes:
        x, y = node.place
        colour = colours.get(node.weight, ALONE) if node.kind == "conv" else "white"
        colour = SUPERVISED if node.supervised else colour
        shape = Circle((x, y), 0.2) if node.kind == "sum" else Rectangle((x - 0.4, y - 0.22), 0.8, 0.44)
        shape.set(facecolor=colour, edgecolor=LINE)
        shapes[id(node)] = axis.add_patch(shape)
        for source in node.inputs:
            rims = {"patchA": shapes[id(source)], "patchB": shape, "shrinkA": 0, "shrinkB": 0}
            arrow = {"arrowstyle": "-|>", "color": LINE, "connectionstyle": f"arc3,rad={bend(source, node)}"}
            axis.annotate("", node.place, source.place, arrowprops=arrow | rims)
        axis.text(x, y, {"sum": "+"}.get(node.kind, node.kind), ha="center", va="center_baseline", size=7.5)
    axis.set_title(name, size=9)
    axis.set(aspect="equal", xlim=extent(nodes), ylim=(-deepest - 0.4, 0.4))
    axis.set_axis_off()


def bend(source: Node, node: Node) -> float:
    """An arrow's curvature around nodes in between: to the left within a column, to the right between columns."""
    steps = node.rank - source.rank
    if node.column == source.column:
        return 0.4 if steps > 1 else 0.0
    return -0.5 if steps > 2 else 0.0


def extent(nodes: list[Node]) -> tuple[float, float]:
    """Left and right limit of the drawing: an arc's width is half its curvature times its length."""
    arcs = [0.5 * bend(source, node) * (node.rank - source.rank) for node in nodes for source in node.inputs]
    return -0.6 - max(0, *arcs), 0.6 + max(node.place[0] for node in nodes) - min(0, *arcs)
