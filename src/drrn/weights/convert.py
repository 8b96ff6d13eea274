"""The configuration of convert.py, its checks, and the conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from drrn.disk import check_output, sha256
from drrn.errors import UserError, printable
from drrn.identity import structure_name
from drrn.schema import key, typed
from drrn.weights.ports import PORTS
from drrn.weights.shipped import shipped

if TYPE_CHECKING:
    from torch import nn

READ = ("drrn", "caffe", "matlab", *PORTS)
EXPORTS = (".onnx", ".pt2")
ONNX = ("onnx", "onnxruntime", "onnxscript")  # the extra `export`; torch.onnx needs the last
WRITTEN = {".safetensors": "drrn", ".onnx": "onnx", ".pt2": "torch_export"}  # by suffix


@dataclass
class ConvertConfig:
    """The keys of conf/convert.yaml."""

    input: str | None = key(".caffemodel, .mat, .pth, .ckpt, .safetensors, or a shipped name")
    output: str | None = key(".safetensors, .onnx, .pt2")
    form: str | None = key("null: recognised by content", choices=tuple(dict.fromkeys((*READ, *WRITTEN.values()))))
    U: int | None = key("residual units, if neither the file nor its name tells them", at_least=0)
    scales: list[int] | None = key("scales of its training, if the file does not tell", at_least=2, distinct=True)
    scale: int | None = key("for .onnx, .pt2 from RGB to larger RGB; null: only Y, as the network", at_least=2)
    info: bool = key("print the input's contents")
    overwrite: bool = key("replace the output if it exists")


def check(cfg: DictConfig) -> ConvertConfig:
    """The checked configuration; a UserError names a wrong key before anything heavy is imported."""
    config = typed(ConvertConfig, cfg)
    if config.input is None:
        raise UserError("input is missing: name the weight file to read")
    if (suffix := Path(config.input).suffix) in EXPORTS:
        raise UserError(
            f"input = {config.input!r}: {suffix} is written, not read; name the weights that it was made of"
        )
    if not Path(config.input).is_file():
        known = shipped()
        if config.input not in known:
            raise UserError(f"input = {config.input!r}: no such file; shipped are {', '.join(known)}")
        config.input = str(known[config.input])
    if config.output is None:
        if not config.info:
            raise UserError(f"output is missing: name the file to write ({', '.join(WRITTEN)}), or info=true")
        return config
    output = Path(config.output)
    if output.suffix not in WRITTEN:
        raise UserError(f"output = {config.output!r}: its suffix names the format, one of {', '.join(WRITTEN)}")
    if config.form not in (None, *READ, WRITTEN[output.suffix]):
        raise UserError(f"form = {config.form!r} and output = {config.output!r}: they name two different forms")
    if config.scale is not None and output.suffix not in EXPORTS:
        raise UserError(f"scale = {config.scale}: only .onnx and .pt2 are written for one; leave it out")
    if output.suffix == ".onnx" and (missing := [name for name in ONNX if find_spec(name) is None]):
        raise UserError(f"output = {config.output!r}: ONNX needs pip install {' '.join(missing)}")
    check_output("output", output)
    if output.exists() and (not config.overwrite or output.samefile(config.input)):
        raise UserError(f"{output} is there already: choose another name, or overwrite=true")
    return config


def convert(config: ConvertConfig) -> None:
    """Read `input`, print notes and information, write `output`; a UserError if one of these fails."""
    form, network, about = read(config)
    for note in [] if form == "drrn" else about["notes"]:
        print(f"note: {printable(note)}")
    if config.info:
        print(describe(Path(config.input), form, network, about))
    if config.output is None:
        return
    from drrn.weights.export import Enlarger, export_onnx, export_program
    from drrn.weights.ours import save_weights

    output, model = Path(config.output), about["model"]
    write = {".safetensors": save_weights, ".onnx": export_onnx, ".pt2": export_program}[output.suffix]
    facts = {key: value for key, value in about.items() if key not in ("format", "model", "digest")}
    if config.scale is not None:
        if getattr(network, "scale", config.scale) != config.scale:
            raise UserError(f"scale = {config.scale}: {config.input} enlarges by {network.scale}")
        if about.get("scales") and config.scale not in about["scales"]:
            print(f"note: it was trained for scales {about['scales']}: expect lower quality")
        facts["scales"], network = [config.scale], Enlarger(network, config.scale)
    difference = write(output, network, model, facts)
    said = f"from {form}" if difference is None else f"differs from ours by at most {difference:.1e}"
    print(f"{output}: {structure_name(model)}, {said}")


def read(config: ConvertConfig) -> tuple[str, nn.Module, dict[str, Any]]:
    """Read the input: (form, network, metadata); a UserError if it cannot be read."""
    from drrn.weights.foreign import read_foreign, recognise
    from drrn.weights.ours import build, load_network

    path = Path(config.input)
    form = config.form if config.form in READ else recognise(path)
    if form == "drrn":
        network, about = load_network(path)
        if config.U not in (None, about["model"].get("U")):
            raise UserError(f"U = {config.U}: {path} holds U = {about['model'].get('U')}")
    else:
        foreign = read_foreign(path, form, config.U, config.scales)
        try:
            network = build(foreign.model, foreign.state)
        except ValueError as error:
            raise UserError(f"{path} is no whole network of the form {form}: {error}") from error
        about = {
            "model": foreign.model,
            "scales": foreign.scales,
            "origin": foreign.origin,
            "source": {"form": form, "file": path.name, "sha256": sha256(path)},
            "notes": foreign.notes,
        }
    if config.scales is not None:
        about["scales"] = config.scales
    return form, network, about


def describe(path: Path, form: str, network: nn.Module, about: dict[str, Any]) -> str:
    """A file's content, one fact per line: form, structure, d, k, norm, origin, departures from the paper."""
    from drrn.layers import conv_weights

    model = about["model"]
    departures = departures_from_paper(model)
    scales = ", ".join(f"×{scale}" for scale in about.get("scales") or []) or "not known"
    source = about.get("source") or {}
    origin = [about.get("origin") or "not known", *(str(source[key]) for key in ("file", "form") if key in source)]
    parameters = sum(p.numel() for p in network.parameters())
    lines = {
        "file": path,
        "form": form,
        "structure": f"{structure_name(model)}: " + ", ".join(f"{key} = {value}" for key, value in model.items()),
        "d": f"{network.depth} layers",
        "k": f"{conv_weights(network):,} convolution weights; {parameters:,} parameters in all",
        "norm": model.get("norm", "none"),
        "scales": scales,
        "origin": ", ".join(origin),
        "paper": f"departs from it: {'; '.join(departures)}" if departures else "fits it",
    }
    return "\n".join(f"{key:10} {printable(value)}" for key, value in lines.items())


def departures_from_paper(model: Mapping[str, Any]) -> list[str]:
    """The departures of a structure from the paper's (Sec. 3 and 4, and the authors' release); [] if none."""
    if "network" in model:
        return [f"it is no DRRN but {structure_name(model)}"]
    released = (64, 128) if model["U"] == 0 else (128,)
    found = {
        f"{model['features']} features, not {' or '.join(map(str, released))}": model["features"] not in released,
        "no BatchNorm": model["norm"] != "batch",
        "no biases": not model["bias"],
        "a ReLU on every identity": model["rectified_identity"],
        "no ReLU before the first convolution": not model["input_relu"],
    }
    return [words for words, true in found.items() if true]
