"""Export of our networks: ONNX, and torch.export's program (which torch recommends over TorchScript)."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drrn.disk import write_whole
from drrn.errors import UserError
from drrn.matlab import YCBCR_FROM_RGB, YCBCR_OFFSET, resize_matrix

SIZES = ((24, 20), (3, 17), (41, 50))  # height and width, at which an exported network is compared with ours
TOLERANCE = 1e-5  # on a scale of 0…1

# How to use an exported network, by the kind of its input: metadata of the file.
COLOUR = "only Y is the network's input; Cb and Cr are enlarged bicubically, then ycbcr2rgb"
USE = {
    "interpolated": {
        "input": "x [N, 1, height, width] float32: luminance Y / 255 of the low-resolution image (MATLAB's "
        "rgb2ycbcr, Y in 16…235), enlarged by the scale with MATLAB's bicubic imresize, neither rounded nor clamped",
        "output": "y, same shape: super-resolved luminance, to be clamped to 0…1",
        "colour": COLOUR,
    },
    "low": {
        "input": "x [N, 1, height, width] float32: luminance Y / 255 of the low-resolution image itself (MATLAB's "
        "rgb2ycbcr, Y in 16…235)",
        "output": "y, larger by the scale: super-resolved luminance, to be clamped to 0…1",
        "colour": COLOUR,
    },
    "rgb": {
        "input": "x [N, 3, height, width] float32: the low-resolution image, R, G, B in 0…1, at least 2×2",
        "output": "y [N, 3, scale · height, scale · width]: the enlarged image, R, G, B in 0…1",
        "colour": "Y, Cb, Cr and bicubic are inside",
    },
}


class Enlarger(nn.Module):
    """A network of luminance with the colour conversion and bicubic around it: from a low-resolution RGB image to the
    enlarged one, as by `photos.enlarge`; the scale is a whole number."""

    input = "rgb"

    def __init__(self, network: nn.Module, scale: int) -> None:
        super().__init__()
        self.network, self.scale = network, scale
        forth = YCBCR_FROM_RGB / 255_000
        phases = resize_matrix(5, scale, 5 * scale).toarray()[2 * scale : 3 * scale]  # [s, 5]: a pixel and 2 around
        constants = {
            "forth": forth[..., None, None],
            "back": np.linalg.inv(forth)[..., None, None],
            "offset": (YCBCR_OFFSET / 255)[:, None, None],
            "cubic": np.einsum("ak,bl->abkl", phases, phases).reshape(-1, 1, 5, 5),
        }
        for name, value in constants.items():
            self.register_buffer(name, torch.from_numpy(value).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, h, w], 0…1 → [N, 3, s · h, s · w], clamped to 0…1."""
        own = F.conv2d(x, self.forth) + self.offset  # Y, Cb, Cr
        large = self.bicubic(own)
        y = self.network(own[:, :1] if self.network.input == "low" else large[:, :1])
        ycbcr = torch.cat([y, large[:, 1:]], 1)
        return F.conv2d(ycbcr - self.offset, self.back).clamp(0, 1)

    def bicubic(self, x: Tensor) -> Tensor:
        """MATLAB's imresize of [N, C, h, w]: one 5×5 kernel for each of a pixel's s² results, borders mirrored."""
        x = torch.cat([x[..., 1:2], x[..., :1], x, x[..., -1:], x[..., -2:-1]], -1)
        x = torch.cat([x[..., 1:2, :], x[..., :1, :], x, x[..., -1:, :], x[..., -2:-1, :]], -2)
        results = F.conv2d(x.flatten(0, 1)[:, None], self.cubic)  # [N · C, s², h, w]
        return F.pixel_shuffle(results, self.scale).unflatten(0, (-1, x.shape[1]))[:, :, 0]


def facts(network: nn.Module, model: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Metadata of an exported file: how to use it, its scales, and as `drrn` the metadata of our own files."""
    return {**USE[network.input], "scales": about.get("scales") or [], "drrn": {"model": model, **about}}


def export_onnx(path: Path, network: nn.Module, model: dict[str, Any], about: dict[str, Any]) -> float:
    """Write a network as ONNX with dynamic batch size, height and width; shared weights are stored once.

    Args:
        network: in evaluation mode, or an `Enlarger` of it.
        model, about: its structure and other metadata.

    Returns:
        The largest difference to our output under onnxruntime, at several sizes.

    Raises:
        UserError: the outputs differ, or the file cannot be written.
    """
    import onnx
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing, which is not used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.onnx.export(
            program(network), input_names=["x"], output_names=["y"], opset_version=18, verbose=False
        )
    proto = exported.model_proto
    proto.ir_version = 8  # opset 18 needs it, and an ONNX Runtime of 2023 reads it
    graph = proto.graph
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.input, *graph.output):
        del part.metadata_props[:]  # each one's place in torch's graph
    times = f"{network.scale}*" if network.input != "interpolated" else ""
    for part, factor in ((graph.input[0], ""), (graph.output[0], times)):
        for axis, name in ((0, "N"), (2, f"{factor}height"), (3, f"{factor}width")):
            part.type.tensor_type.shape.dim[axis].dim_param = name
    said = facts(network, model, about)
    said |= {"scales": ",".join(map(str, said["scales"])), "drrn": json.dumps(said["drrn"])}
    onnx.helper.set_model_props(proto, said)
    onnx.checker.check_model(proto)
    serialised = proto.SerializeToString()
    session = onnxruntime.InferenceSession(serialised, providers=["CPUExecutionProvider"])
    difference = largest_difference(network, lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]))
    write_whole(path, serialised)
    return difference


def export_program(path: Path, network: nn.Module, model: dict[str, Any], about: dict[str, Any]) -> float:
    """Write a network as torch.export's program (.pt2), to be run by `torch.export.load(path).module()`.

    Arguments, result and errors are those of `export_onnx`; the metadata are in the extra file `drrn.json`.
    """
    exported = program(network)
    said = json.dumps(facts(network, model, about), ensure_ascii=False)
    difference = largest_difference(network, exported.module())
    content = io.BytesIO()  # a path would need the suffix .pt2
    torch.export.save(exported, content, extra_files={"drrn.json": said})
    write_whole(path, content.getvalue())
    return difference


def program(network: nn.Module) -> torch.export.ExportedProgram:
    """The network's graph for any batch size and any image size from 2×2 on, without paths of its source."""
    free = {0: torch.export.Dim("N"), 2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    example = torch.zeros(2, 3 if network.input == "rgb" else 1, *SIZES[0])  # an N of 1 would become a constant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.export.export(network, (example,), dynamic_shapes=(free,))
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)
    return exported


def largest_difference(network: nn.Module, other: Callable[[Tensor], Tensor]) -> float:
    """The largest difference between the outputs of a network and its exported form, at `SIZES`, for −0.1…1.1.

    Raises:
        UserError: it is above `TOLERANCE` (relative to the largest output if that is above 1).
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(1)
    for N, (height, width) in enumerate(SIZES, start=1):
        x = torch.rand(N, 3 if network.input == "rgb" else 1, height, width, generator=generator) * 1.2 - 0.1
        with torch.inference_mode():
            ours, theirs = network(x), other(x)
        difference = (ours - theirs).abs().max().item() if theirs.shape == ours.shape else float("inf")
        if not difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
            raise UserError(
                f"the exported network differs from ours by {difference:.3g} at {height}×{width}: not written"
            )
        worst = max(worst, difference)
    return worst
