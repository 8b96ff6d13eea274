"""What `convert.py` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, DictConfig

from drrn.config import ModelConfig, key, typed
from drrn.errors import UserError
from drrn.identity import structure_name

if TYPE_CHECKING:
    from drrn.model import DRRN


SUFFIXES = {".safetensors": "drrn", ".ckpt": "lightning", ".onnx": "onnx", ".pt2": "torch_export"}
READ = ("drrn", "caffe", "jt827859032", "yjn870", "twtygqyy")
WRITTEN = tuple(SUFFIXES.values())


@dataclass
class ConvertConfig:
    """What conf/convert.yaml documents."""

    input: str | None = MISSING
    output: str | None = MISSING
    form: str | None = MISSING
    U: int | None = key("residual units, where the file does not say", at_least=0)
    scales: list[int] | None = key("that the weights were trained for", at_least=2)
    info: bool = MISSING
    overwrite: bool = MISSING


def check(cfg: DictConfig) -> ConvertConfig:
    """The configuration, refused by key before anything heavy is imported.

    Raises:
        UserError: a wrong key, type or value, or an output that is there already.
    """
    config = typed(ConvertConfig, cfg)
    if config.input is None:
        raise UserError("input is missing: name the weight file to read")
    if not Path(config.input).is_file():
        raise UserError(f"input = {config.input!r}: no such file")
    if config.form is not None and config.form not in READ + WRITTEN:
        allowed = ", ".join(dict.fromkeys(READ + WRITTEN))
        raise UserError(f"form = {config.form!r}: allowed are {allowed}, or null to recognise it")
    if config.scales == []:
        raise UserError("scales = []: whole numbers of at least 2, or null")
    if config.output is None:
        if not config.info:
            raise UserError(
                "output is missing: name the file to write (.safetensors, .ckpt, .onnx, .pt2), or info=true"
            )
        return config
    output = Path(config.output)
    if output.suffix not in SUFFIXES:
        raise UserError(f"output = {config.output!r}: its suffix says what to write, one of {', '.join(SUFFIXES)}")
    if config.form in WRITTEN and config.form not in READ and config.form != SUFFIXES[output.suffix]:
        raise UserError(f"form = {config.form!r} and output = {config.output!r}: they say two different things")
    if output.exists() and (not config.overwrite or output.samefile(config.input)):
        raise UserError(f"{output} is there already: choose another name, or overwrite=true")
    return config


def convert(config: ConvertConfig) -> None:
    """Read `input`, say what is to be known, write `output`.

    Raises:
        UserError: the file cannot be read, or the output not be written.
    """
    form, network, about, notes = read(config)
    for note in notes:
        print(f"note: {note}")
    if config.info:
        print(describe(Path(config.input), form, network, about))
    if config.output is None:
        return
    from drrn.weights.export import export_onnx, export_program
    from drrn.weights.ours import save_checkpoint, save_weights

    output, model = Path(config.output), ModelConfig(**about["model"])
    facts = {key: value for key, value in about.items() if key not in ("format", "model", "digest")}
    exports = {".onnx": export_onnx, ".pt2": export_program}
    if output.suffix in exports:
        difference = exports[output.suffix](network, about, output)
        print(f"{output}: {structure_name(model)}, differs from ours by at most {difference:.1e}")
        return
    save = save_weights if output.suffix == ".safetensors" else save_checkpoint
    save(output, network, model, facts)
    print(f"{output}: {structure_name(model)} from {form}")


def read(config: ConvertConfig) -> tuple[str, DRRN, dict[str, Any], list[str]]:
    """The input as (form, network, what is known of it, what its user should know).

    Raises:
        UserError: it cannot be read.
    """
    from dataclasses import asdict

    from drrn.images import sha256
    from drrn.weights.foreign import read_foreign, recognise
    from drrn.weights.ours import build, load_network

    path = Path(config.input)
    form = config.form if config.form in READ else recognise(path)
    if form == "drrn":
        network, about = load_network(path)
        if config.U not in (None, about["model"]["U"]):
            raise UserError(f"U = {config.U}: {path} holds U = {about['model']['U']}")
        notes = []
    else:
        foreign = read_foreign(path, form, config.U)
        try:
            network = build(foreign.model, foreign.state)
        except ValueError as error:
            raise UserError(f"{path} is no whole network of the form {form}: {error}") from error
        about = {
            "model": asdict(foreign.model),
            "scales": foreign.scales,
            "origin": foreign.origin,
            "source": {"form": form, "file": path.name, "sha256": sha256(path)},
            "notes": foreign.notes,
        }
        notes = foreign.notes
    if config.scales is not None:
        about["scales"] = config.scales
    return form, network, about, notes


def describe(path: Path, form: str, network: DRRN, about: dict[str, Any]) -> str:
    """What a file holds, a line each: form, structure, d, k, norm, origin, and whether it fits the paper."""
    model = ModelConfig(**about["model"])
    departures = departures_from_paper(model)
    scales = ", ".join(f"×{scale}" for scale in about.get("scales") or []) or "not known"
    source = about.get("source") or {}
    origin = [about.get("origin") or "not known", *(str(source[key]) for key in ("file", "form") if key in source)]
    parameters = sum(p.numel() for p in network.parameters())
    lines = {
        "file": path,
        "form": form,
        "structure": f"{structure_name(model)}: B = {model.B}, U = {model.U}, {model.features} features",
        "d": f"{network.depth} layers",
        "k": f"{network.conv_weight_count:,} convolution weights; {parameters:,} parameters in all",
        "norm": model.norm,
        "scales": scales,
        "origin": ", ".join(origin),
        "paper": f"departs from it: {'; '.join(departures)}" if departures else "fits it",
    }
    text = {key: "".join(c if c.isprintable() else "?" for c in str(value)) for key, value in lines.items()}
    return "\n".join(f"{key:10} {value}" for key, value in text.items())


def departures_from_paper(model: ModelConfig) -> list[str]:
    """Where a structure is none of the paper's (Sec. 3 and 4, and the authors' release); empty if it is one."""
    released = (64, 128) if model.U == 0 else (128,)
    found = {
        f"{model.features} features, not {' or '.join(map(str, released))}": model.features not in released,
        "no BatchNorm": model.norm != "batch",
        "no biases": not model.bias,
        "a ReLU on every identity": model.rectified_identity,
        "no ReLU before the first convolution": not model.input_relu,
    }
    return [words for words, true in found.items() if true]
