"""Weights on disk: one safetensors file that says what network it holds.

The metadata key `drrn` is JSON: {"format": 1, "model": {fields of ModelConfig}, "scales": […], "origin": …, …}.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from drrn import Refusal
from drrn.config import ModelConfig
from drrn.model import DRRN

FORMAT = 1


def save_weights(path: Path, network: DRRN, model: ModelConfig, about: dict[str, Any]) -> None:
    """Write a network as safetensors, whole or not at all.

    Args:
        path: to write.
        network: whose parameters and BatchNorm statistics are stored, shared ones once.
        model: its structure.
        about: further facts: training scales, origin.
    """
    metadata = {"drrn": json.dumps({"format": FORMAT, "model": asdict(model), **about})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise Refusal(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_network(path: Path) -> tuple[DRRN, dict[str, Any]]:
    """A network in evaluation mode and what its file says of it.

    Reads our safetensors and our Lightning checkpoints; neither can execute code.

    Raises:
        Refusal: the file is missing, damaged or not one of these.
    """
    if not path.is_file():
        raise Refusal(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["drrn"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            about = {"model": checkpoint["hyper_parameters"]["model"], "steps": checkpoint["global_step"]}
            prefix = "network."
            state = {
                name.removeprefix(prefix): tensor
                for name, tensor in checkpoint["state_dict"].items()
                if name.startswith(prefix)
            }
        network = DRRN(**about["model"])
        network.load_state_dict(state)
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise Refusal(
            f"{path} is not weights of ours ({type(error).__name__}: {error}); give weights.safetensors or a .ckpt "
            "of this project"
        ) from error
    return network.eval(), about


def start_from(path: Path, network: DRRN, model: ModelConfig) -> None:
    """Fine-tuning: give `network`, built from `model`, the parameters and statistics of a file of ours.

    Raises:
        Refusal: the file cannot be read, or holds another structure; the text says what to type.
    """
    loaded, about = load_network(path)
    held, asked = asdict(ModelConfig(**about["model"])), asdict(model)
    differing = [key for key in asked if held[key] != asked[key]]
    if differing:
        words = " ".join(f"model.{key}={str(held[key]).lower()}" for key in differing)
        raise Refusal(f"init_from = {str(path)!r} holds another network than model.* describes; add {words}")
    network.load_state_dict(loaded.state_dict())
