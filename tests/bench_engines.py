"""The bench against OpenVINO and ONNX Runtime: `python tests/bench.py engines`, on a CPU.

They are no dependency of the project: `pip install '.[export]' openvino` in an environment of the bench's own. An
engine that cannot be imported has no row. Each engine, and each precision of ours, runs in a process of its own, in
turn, on the same network with random weights, from array to array.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bench
from drrn.config import ModelConfig
from drrn.fast.precision import chosen
from drrn.weights.export import export_onnx

THREADS = torch.get_num_threads()


def image(side: int) -> np.ndarray:
    return np.random.default_rng(0).random((1, 1, side, side), np.float32)


def onnxruntime_inference(path: str, side: int) -> Callable[[], Any]:
    import onnxruntime

    options, x = onnxruntime.SessionOptions(), image(side)
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})[0]


def openvino_inference(path: str, side: int, precision: str | None = None) -> Callable[[], Any]:
    """Args: precision: "f32", or None for OpenVINO's default."""
    import openvino

    core, x = openvino.Core(), image(side)
    model = core.read_model(path)
    model.reshape([1, 1, side, side])
    settings = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = core.compile_model(model, "CPU", settings)
    return lambda: compiled(x)[0]


def by_itself() -> str:
    """OpenVINO's default precision on this CPU."""
    import openvino

    return openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()


def engines(sizes: dict[str, Any]) -> Iterator[bench.Row]:
    """An image by B1U9: their time over ours, each engine in float32, and OpenVINO also in its default."""
    installed = {name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)}
    if not installed:
        return
    (U, side, _), *_ = sizes["images"]
    ours = chosen("auto", torch.device("cpu"))
    for norm in ("none", "batch"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            model = vars(ModelConfig(1, U, sizes["features"], norm, True, True, True))
            export_onnx(path, bench.network(U, norm, sizes["features"]).eval(), model, {})
            things: dict[str, tuple] = {"float32": (bench.our_inference, U, side, norm, sizes["features"])}
            if "onnxruntime" in installed:
                things["ONNX Runtime"] = (onnxruntime_inference, str(path), side)
            if "openvino" in installed:
                things["OpenVINO in float32"] = (openvino_inference, str(path), side, "f32")
                things["OpenVINO as it comes"] = (openvino_inference, str(path), side)
                things[ours] = (bench.our_inference, U, side, norm, sizes["features"], ours)
            times = bench.in_turn(things, sizes["engines"])
        what = f"inference B1U{U} {side}², {'BatchNorm' if norm == 'batch' else 'no BatchNorm'}"
        for name in [name for name in ("ONNX Runtime", "OpenVINO in float32") if name in things]:
            yield bench.ratio(f"{what}: rate in float32 of {name}'s", "≥ 0.97", times, name, "float32")
        if "openvino" in installed:
            row = f"{what}: rate in {ours} of OpenVINO's as it comes ({by_itself()})"
            yield bench.ratio(row, "≥ 0.9", times, "OpenVINO as it comes", ours)
