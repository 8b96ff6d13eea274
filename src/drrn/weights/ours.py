"""Our weights on disk: one safetensors file, with its network's structure in the metadata.

The metadata key `drrn` is JSON: {"format": 1, "model": {arguments of the network, and its name as `network` if it is
no DRRN}, "scales": […], "origin": …, …, "digest": SHA-256 of the tensors}.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from drrn.config import DEEPEST
from drrn.disk import write_whole
from drrn.errors import UserError, printable
from drrn.help import script
from drrn.networks import complete, on_paper
from drrn.weights.files import container, read_bytes, safetensors_header
from drrn.weights.pickles import is_lightning, named_tensors, read_tensors, read_torch

FORMAT = 1
MOST_FACTS = 10_000  # values in a file's metadata
# The known keys of a file's metadata, with their types; another type is refused.
FACTS = {"format": int, "model": dict, "digest": str, "origin": str, "scales": list, "source": dict, "notes": list,
         "seed": int, "steps": int, "experiment": str}  # fmt: skip


def save_weights(path: Path, network: nn.Module, model: dict[str, Any], about: dict[str, Any]) -> None:
    """Write a network's parameters and BatchNorm statistics as safetensors; the file appears whole or not at all.

    Shared parameters are stored once. `model` is the network's structure, `about` more metadata, of `FACTS`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    facts = {"format": FORMAT, "model": model, **about, "digest": digest(tensors)}
    # In one piece: safetensors' own save_file makes files private (0600).
    write_whole(path, save_safetensors(tensors, {"drrn": json.dumps(facts)}))


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, sorted by name."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def build(model: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """A network in evaluation mode from its structure and its state dict, float32.

    The structure is checked against the tensors before memory is allocated.

    Raises:
        ValueError: structure and tensors do not match, or a value is not finite.
    """
    for key, value in model.items():  # even on the meta device, 10⁹ layers would take forever
        if isinstance(value, int) and value > 10 * DEEPEST:
            raise ValueError(f"{key} = {value:,}: more than any network has")
    network = on_paper(model)
    wanted = network.state_dict()
    for name in wanted.keys() | state.keys():
        shapes = [list(tensors[name].shape) if name in tensors else "none" for tensors in (wanted, state)]
        if shapes[0] != shapes[1]:
            raise ValueError("tensor {!r}: the structure has {}, the file {}".format(name[:80], *shapes))
        if state[name].is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"tensor {name!r} holds {state[name].dtype}, which are no weights")
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"tensor {name!r} holds values that are not finite")
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    network.load_state_dict(state, assign=True)
    return network.eval()


def load_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load a network in evaluation mode, and its file's metadata.

    Reads our safetensors and our Lightning checkpoints, distinguished by content; neither can execute code.

    Raises:
        UserError: the file is missing, damaged or not one of these.
    """
    data = read_bytes(path)
    try:
        state, about = _read_safetensors(data) if container(data) == "safetensors" else _read_lightning(data)
        network = build(about["model"], state)
    except UserError as error:  # a network of another clone, or arguments that ours does not take
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise UserError(
            f"{path} is not weights of ours ({type(error).__name__}: {error}); give weights.safetensors or a .ckpt "
            f"of this project, or convert it first: {script('convert')} input=FILE output=FILE.safetensors"
        ) from error
    return network, about


def _read_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = load_safetensors(data)
    facts = safetensors_header(data)["__metadata__"].get("drrn")
    if facts is None:
        raise ValueError("no metadata of this project")
    about = checked_facts(json.loads(facts))
    if about.get("format", FORMAT) > FORMAT:
        raise ValueError(f"it is of format {about['format']}; a newer version of this project reads it")
    if about.get("digest", digest(state)) != digest(state):
        raise ValueError("its tensors are not those that its digest was made of: damaged")
    return state, about


def _read_lightning(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    root = read_torch(data)
    if not is_lightning(root):
        raise ValueError("no Lightning checkpoint of this project")
    facts = root.get("drrn", {})
    if not isinstance(facts, dict) or not isinstance(root["state_dict"], dict):
        raise ValueError("its `drrn` or its `state_dict` is no dict")
    steps = root.get("global_step")
    about = checked_facts({**facts, "model": root["hyper_parameters"]["model"], "steps": steps})
    stored = named_tensors({n: s for n, s in root["state_dict"].items() if str(n).startswith("network.")})
    return {name.removeprefix("network."): tensor for name, tensor in read_tensors(stored).items()}, about


def checked_facts(about: Any) -> dict[str, Any]:
    """Check a file's metadata and make its `origin` printable; a ValueError if this project does not write such."""
    if not isinstance(about, dict):
        raise ValueError("its metadata are no dict")
    pending = [about]
    for value in pending:  # grows in the loop: in a pickle, few bytes can reference any number of values
        if not isinstance(value, dict | list | tuple | str | int | float | None):
            raise ValueError(f"its metadata contain a {type(value).__name__}")
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if len(pending) > MOST_FACTS:
            raise ValueError(f"its metadata have more than {MOST_FACTS:,} values")
    for key, kind in FACTS.items():
        value = about.get(key)
        if not isinstance(value, kind) and (value is not None or key == "model"):
            raise ValueError(f"its {key} in the metadata has another type than this project writes")
    if not all(type(scale) is int and scale > 1 for scale in about.get("scales") or ()):
        raise ValueError("its scales in the metadata are not whole numbers above 1")
    given, about["model"] = about["model"], complete(about["model"])
    for key, value in about["model"].items():
        if repr(given.get(key, value)) != repr(value):  # converted
            raise ValueError(f"its network has {key} = {given[key]!r}, of another type than it takes")
    if about.get("origin"):
        about["origin"] = printable(about["origin"])
    return about


def initial_state(path: Path, model: dict[str, Any]) -> dict[str, Tensor]:
    """The initial state dict of a fine-tuning, from a file of ours, whose structure has to be `model`.

    A network of one scale may start from another scale's weights, if its tensors have the same shapes.

    Raises:
        UserError: the file cannot be read, or has another structure; the text says what to type.
    """
    network, about = load_network(path)
    held, asked = about["model"], model
    differing = [key for key in held | asked if held.get(key) != asked.get(key)]
    state = network.state_dict()
    if differing == ["scale"]:  # FSRCNN: its tensors serve every scale, ESPCN's do not
        shapes = {name: tensor.shape for name, tensor in on_paper(model).state_dict().items()}
        differing = [] if shapes == {name: tensor.shape for name, tensor in state.items()} else differing
    if differing:
        words = " ".join(f"model.{key}={str(held.get(key)).lower()}" for key in differing)
        raise UserError(f"init_from = {str(path)!r} holds another network than model.* describes; add {words}")
    return state
