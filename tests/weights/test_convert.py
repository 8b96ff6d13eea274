"""`src/convert.py`, our own weight files, exports, and fine-tuning from weights."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save as save_safetensors
from torch import nn
from torch.nn import functional as F

import drrn
from drrn.config import in_full
from drrn.errors import UserError
from drrn.fsrcnn import FSRCNN
from drrn.home import CONF
from drrn.identity import structure_name
from drrn.model import DRRN
from drrn.networks import NETWORKS
from drrn.runs import start as train
from drrn.runs.request import request
from drrn.weights import convert as command
from drrn.weights.export import Enlarger
from drrn.weights.ours import digest, initial_state, load_network, save_weights

SRC = Path(command.__file__).parents[2]
STRUCTURE = {
    "B": 1,
    "U": 2,
    "features": 6,
    "norm": "batch",
    "bias": True,
    "weight_sharing": True,
    "multi_path": True,
}


def random_network(**changes) -> tuple[DRRN, dict]:
    """A network whose BatchNorms do something."""
    model = in_full({**STRUCTURE, **changes})
    torch.manual_seed(0)
    network = DRRN(**model).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.3, 0.8)
            nn.init.normal_(layer.bias, 0, 0.1)
    return network, model


def photograph(height: int, width: int) -> torch.Tensor:
    """Part of a photograph [1, 1, H, W], a little beyond 0…1, like the result of bicubic interpolation."""
    y = skimage.data.camera()[216 : 216 + height, 240 : 240 + width] / 255
    return torch.from_numpy(y * 1.1 - 0.05).float()[None, None]


def run(**options) -> None:
    """Check and convert with these options, as from the command line."""
    defaults = OmegaConf.load(SRC.parent / "conf" / "convert.yaml")
    given = OmegaConf.create({key: defaults[key] for key in defaults if key not in ("defaults", "hydra")})
    command.convert(
        command.check(OmegaConf.merge(given, {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}))
    )


class Port(nn.Module):
    """jt827859032's four convolutions, by name."""

    def __init__(self) -> None:
        super().__init__()
        for name, inputs, out in (("input", 1, 4), ("conv1", 4, 4), ("conv2", 4, 4), ("output", 4, 1)):
            self.add_module(name, nn.Conv2d(inputs, out, 3, padding=1, bias=False))


def port_file(folder: Path, name: str = "model.pth") -> Path:
    torch.manual_seed(1)
    path = folder / name
    torch.save(Port().state_dict(), path)
    return path


# ------------------------------------------------------------------ our own form


@pytest.mark.parametrize("changes", [
    {}, {"weight_sharing": False}, {"norm": "none", "bias": False, "rectified_identity": True},
    {"U": 0, "B": 4, "input_relu": False}, {"multi_path": False, "B": 2},
])  # fmt: skip
def test_a_network_comes_back_as_it_was(changes, tmp_path) -> None:
    network, model = random_network(**changes)
    path = tmp_path / "folder" / "weights"
    save_weights(path, network, model, {"scales": [2, 3], "origin": "here", "steps": 7})
    back, about = load_network(path)
    assert not back.training
    assert about["model"] == model
    assert (about["scales"], about["origin"], about["steps"]) == ([2, 3], "here", 7)
    x = photograph(20, 24)
    with torch.no_grad():
        assert torch.equal(back(x), network(x))
    assert list(path.parent.iterdir()) == [path]  # nothing temporary is left
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_shared_weights_are_stored_once(tmp_path) -> None:
    sizes = []
    for U in (1, 9):
        network, model = random_network(U=U, features=32, norm="none")
        save_weights(tmp_path / "w.safetensors", network, model, {})
        sizes.append((tmp_path / "w.safetensors").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 100


def parts(data: bytes) -> tuple[dict, bytes]:
    """A safetensors file (huggingface/safetensors: uint64, JSON, data) → header, data."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewritten(data: bytes, **facts) -> bytes:
    """The same file with changed metadata."""
    header, rest = parts(data)
    about = {**json.loads(header["__metadata__"]["drrn"]), **facts}
    header["__metadata__"]["drrn"] = json.dumps({k: v for k, v in about.items() if v is not ...})
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def test_what_the_file_says_of_itself(tmp_path) -> None:
    network, model = random_network()
    path = tmp_path / "w.safetensors"
    save_weights(path, network, model, {"scales": [2, 3, 4], "origin": "here"})
    header, _ = parts(path.read_bytes())
    about = json.loads(header["__metadata__"]["drrn"])
    assert about["format"] == 1
    assert about["model"] == model
    assert about["digest"] == digest(network.state_dict())
    assert len(about["digest"]) == 64


def test_files_from_before_the_switches_and_the_digest_load(tmp_path) -> None:
    network, model = random_network()
    path = tmp_path / "w.safetensors"
    save_weights(path, network, model, {})
    path.write_bytes(rewritten(path.read_bytes(), model=STRUCTURE, digest=...))
    back, about = load_network(path)
    assert torch.equal(back(photograph(9, 9)), network(photograph(9, 9)))
    assert about["model"] == model


def test_every_cut_and_every_changed_weight_is_noticed(tmp_path) -> None:
    network, model = random_network(features=1, U=1, norm="none")
    path = tmp_path / "w.safetensors"
    save_weights(path, network, model, {})
    data = path.read_bytes()
    _, values = parts(data)
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(UserError):
            load_network(path)
    for at in range(len(data) - len(values), len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(UserError, match="digest"):
            load_network(path)


@pytest.mark.parametrize(("facts", "words"), [
    ({"model": {**STRUCTURE, "U": 10**9}}, "layers"),
    ({"model": {**STRUCTURE, "B": 10**9, "U": 0}}, "layers"),
    ({"model": {**STRUCTURE, "B": -1}}, "B = -1"),
    ({"model": {**STRUCTURE, "features": 10**5}}, "features = 100000"),
    ({"model": {**STRUCTURE, "U": 3}}, "structure has"),
    ({"model": {**STRUCTURE, "U": "2"}}, "not weights"),
    ({"model": {**STRUCTURE, "norm": "layer"}}, "norm"),
    ({"model": {**STRUCTURE, "depth": 3}}, "depth"),
    ({"model": None}, "not weights"),
    ({"format": 2}, "newer version"),
    ({"origin": {"a": 1}}, "origin"),
    ({"scales": 3}, "scales"),
])  # fmt: skip
def test_facts_that_do_not_fit_the_tensors_are_refused_without_taking_memory(facts, words, tmp_path) -> None:
    network, model = random_network()
    path = tmp_path / "w.safetensors"
    save_weights(path, network, model, {})
    load_network(path)  # imports now, outside the measurement
    path.write_bytes(rewritten(path.read_bytes(), **facts))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=words):
            load_network(path)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("facts", "words"), [
    ({"model": []}, "model"), ({"model": "DRRN"}, "model"),
    ({"model": {**STRUCTURE, "multi_path": "false"}}, "multi_path"),
    ({"model": {**STRUCTURE, "bias": 1}}, "bias"), ({"model": {**STRUCTURE, "B": True}}, "B = true"),
    ({"model": {**STRUCTURE, "B": None}}, "B = null"), ({"model": {**STRUCTURE, "norm": ["batch"]}}, "norm"),
    ({"model": {**STRUCTURE, "B": "${oc.env:HOME}"}}, "may not contain"),
    ({"scales": [2, None]}, "scales"), ({"scales": [2.5]}, "scales"), ({"scales": [0]}, "scales"),
    ({"source": []}, "source"), ({"seed": "1"}, "seed"), ({"steps": [1]}, "steps"), ({"experiment": 5}, "experiment"),
    ({"notes": "none"}, "notes"), ({"format": "1"}, "format"), ({"digest": 5}, "digest"),
])  # fmt: skip
def test_facts_of_another_type_are_refused_by_name(facts, words, entry_point, tmp_path) -> None:
    network, model = random_network()
    path = tmp_path / "w.safetensors"
    save_weights(path, network, model, {})
    path.write_bytes(rewritten(path.read_bytes(), **facts))
    code, _, err = entry_point("convert", f"input={path}", "info=true")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert str(path) in err
    assert words in err


@pytest.mark.parametrize("text", ["null", "[]", "5", "{}", '"text"', "[" * 100_000])
def test_metadata_that_are_no_mapping_are_refused(text, tmp_path) -> None:
    network, model = random_network()
    path = tmp_path / "w.safetensors"
    save_weights(path, network, model, {})
    header, rest = parts(path.read_bytes())
    for metadata in ({"drrn": text}, None, {}):
        content = json.dumps({**header, "__metadata__": metadata}).encode()
        path.write_bytes(struct.pack("<Q", len(content)) + content + rest)
        with pytest.raises(UserError, match="not weights of ours"):
            load_network(path)


DEEP: tuple = ()
for _ in range(200):
    DEEP = (DEEP, DEEP)  # few bytes in a pickle, but hashing, writing or printing it takes forever


@pytest.mark.parametrize("change", [
    lambda c: c["hyper_parameters"]["model"].update(network=DEEP),
    lambda c: c["hyper_parameters"]["model"].update(B=DEEP),
    lambda c: c.update(drrn={"source": {"file": DEEP}}), lambda c: c.update(drrn={"more": torch.zeros(1)}),
    lambda c: c.update(drrn=None), lambda c: c.update(drrn=[1]), lambda c: c.update(state_dict=None),
    lambda c: c.update(state_dict=[1]), lambda c: c.update(hyper_parameters=None),
    lambda c: c.update(hyper_parameters={"model": None}), lambda c: c.update(hyper_parameters={"model": [1]}),
    lambda c: c["hyper_parameters"]["model"].update(multi_path="false"), lambda c: c.update(global_step="7"),
    lambda c: c["state_dict"].update({"network.conv_rec.bias": None}),
    lambda c: c["state_dict"].update({"network.conv_rec.bias": [0.0]}),
    lambda c: c["state_dict"].update({"network.conv_rec.bias": torch.zeros(1, dtype=torch.int64)}),
])  # fmt: skip
def test_a_checkpoint_of_other_types_is_refused(change, tmp_path) -> None:
    network, model = random_network()
    path = tmp_path / "w.ckpt"
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    content = {"global_step": 0, "hyper_parameters": {"model": model}, "state_dict": state}
    content["drrn"] = {"scales": [2]}
    torch.save(content, path)
    load_network(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(UserError, match="not weights of ours") as refusal:
        load_network(path)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("kind", [torch.complex64, torch.int32, torch.bool])
def test_weights_are_real_numbers(kind, tmp_path) -> None:
    network, model = random_network(norm="none")
    path = tmp_path / "w.safetensors"
    save_weights(path, network, model, {})
    tensors = {name: tensor.to(kind) for name, tensor in network.state_dict().items()}
    facts = {"format": 1, "model": model}
    path.write_bytes(save_safetensors(tensors, {"drrn": json.dumps(facts)}))
    with pytest.raises(UserError, match=str(kind)):
        load_network(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_regular_file_is_not_waited_for(kind, entry_point, tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path.name),
    }[kind]()
    code, _, err = entry_point("convert", f"input={path}", "info=true")
    assert code == 2
    assert str(path) in err
    assert "Traceback" not in err
    with pytest.raises(UserError):
        load_network(path)


@pytest.mark.parametrize("output", ["folder.onnx", "file/w.onnx", "x" * 300 + ".pt2", "/proc/nowhere/w.safetensors"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(output, entry_point, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder.onnx").mkdir()
    path = port_file(tmp_path)
    arguments = [f"input={path}", f"output={tmp_path / output}", "U=1", "overwrite=true"]
    code, out, err = entry_point("convert", *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "output" in err
    assert out == ""
    assert (tmp_path / "file").read_text() == "precious"


def test_other_files_are_no_weights_of_ours(tmp_path) -> None:
    path = port_file(tmp_path)
    with pytest.raises(UserError, match=r"convert\.py"):
        load_network(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="not weights of ours"):
        load_network(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load_network(path)
    header = json.dumps({"__metadata__": {"drrn": "[" * 100_000}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="not weights of ours"):
        load_network(path)


def test_a_checkpoint_that_lightning_wrote(tmp_path) -> None:
    from lightning.pytorch import Trainer

    from drrn.config import OptimConfig
    from drrn.module import SuperResolution

    _, model = random_network()
    optim = OptimConfig(
        algorithm="sgd", lr=0.1, momentum=0.9, weight_decay=0, bias_lr_mult=1.0, theta=0.01, clip="value",
        schedule="halve", halve_every_epochs=1.0, halve_every_steps=None, residual_scale=1.0, bn_average=0.999,
    )  # fmt: skip
    module = SuperResolution(model, asdict(optim))
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1)
    trainer.strategy.connect(module)
    path = tmp_path / "step.ckpt"
    trainer.save_checkpoint(path)
    network, about = load_network(path)
    assert about["steps"] == 0
    assert digest(network.state_dict()) == digest(module.network.state_dict())
    run(input=path, output=tmp_path / "w.safetensors")
    assert digest(load_network(tmp_path / "w.safetensors")[0].state_dict()) == digest(module.network.state_dict())


# ------------------------------------------------------------------ the command


def test_a_port_becomes_ours_with_its_origin(tmp_path, capsys) -> None:
    path = port_file(tmp_path)
    with pytest.raises(UserError, match="give U="):
        run(input=path, output=tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()
    run(input=path, output=tmp_path / "w.safetensors", U=3)
    network, about = load_network(tmp_path / "w.safetensors")
    assert (network.B, network.U, about["scales"]) == (1, 3, [2, 3, 4])
    assert about["source"]["file"] == "model.pth"
    assert about["origin"] == "jt827859032/DRRN-pytorch"
    assert "rectified_identity" in capsys.readouterr().out
    # its convolutions, run by hand
    torch.manual_seed(1)
    port, x = Port(), photograph(12, 15)
    with torch.no_grad():
        start = port.input(x.relu()).relu()
        h = start
        for _ in range(3):
            h = port.conv2(port.conv1(h.relu()).relu()) + start
        torch.testing.assert_close(network(x), port.output(h.relu()) + x.relu(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_port_in_another_container(kind, tmp_path) -> None:
    """BasicSR's dict, and safetensors without our metadata; those of another network are refused by their names."""
    state = {name: tensor.to(kind) for name, tensor in torch.load(port_file(tmp_path)).items()}
    torch.save({"params": state}, tmp_path / "a.pth")
    (tmp_path / "b.safetensors").write_bytes(save_safetensors(state, {"format": "pt"}))
    found = []
    for name in ("a.pth", "b.safetensors"):
        run(input=tmp_path / name, output=tmp_path / f"{name}.safetensors", U=3)
        network, about = load_network(tmp_path / f"{name}.safetensors")
        found.append((about["origin"], digest(network.state_dict())))
    assert found[0] == found[1]
    assert torch.equal(network.blocks[0].conv.weight, state["input.weight"].float())
    path = tmp_path / "c.safetensors"
    path.write_bytes(save_safetensors({"unet.weight": torch.ones(3)}))
    with pytest.raises(UserError, match=r"its tensors \('unet\.weight', …\) are named as in none of"):
        run(input=path, info=True)
    with pytest.raises(UserError, match=r"not weights of ours \(ValueError: no metadata of this project\)"):
        load_network(path)


def test_scales_and_u_are_taken_from_the_command_and_the_name(tmp_path) -> None:
    run(input=port_file(tmp_path, "DRRN_B1U25.pth"), output=tmp_path / "w.safetensors", scales=[3])
    network, about = load_network(tmp_path / "w.safetensors")
    assert (network.U, about["scales"]) == (25, [3])
    assert network.depth == 52


@pytest.mark.parametrize(("options", "words"), [
    ({"input": None}, "input is missing"),
    ({"input": "nowhere.pth"}, "nowhere.pth"),
    ({"input": "x2.onnx"}, "written, not read"),
    ({"output": None}, "output is missing"),
    ({"output": "w.txt"}, r"w\.txt"),
    ({"form": "keras"}, "keras"),
    ({"form": "onnx"}, "two different forms"),
    ({"U": -1}, "U = -1"),
    ({"U": 0}, "at least 1"),
    ({"scales": [1]}, "scales"),
    ({"form": "caffe"}, "cannot be read as caffe"),
    ({"form": "yjn870"}, "cannot be read as yjn870"),
    ({"outptu": "x"}, "outptu"),
    ({"info": "perhaps"}, "info"),
])  # fmt: skip
def test_wrong_options_are_refused_by_name(options, words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    port_file(tmp_path)
    with pytest.raises(UserError, match=words):
        run(**{"input": "model.pth", "output": "w.safetensors", "U": 2, **options})
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def test_onnx_without_its_packages_is_refused_before_the_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "ONNX", ("torch", "no_such_package"))
    with pytest.raises(UserError, match="pip install no_such_package"):
        run(input=port_file(tmp_path), output=tmp_path / "w.onnx", U=1)


def test_nothing_is_written_over_unasked(tmp_path) -> None:
    path, output = port_file(tmp_path), tmp_path / "w.safetensors"
    output.write_text("precious")
    with pytest.raises(UserError, match="overwrite=true"):
        run(input=path, output=output, U=1)
    assert output.read_text() == "precious"
    run(input=path, output=output, U=1, overwrite=True)
    with pytest.raises(UserError, match="another name"):
        run(input=output, output=output, overwrite=True)
    assert load_network(output)[0].U == 1


def info(capsys, **options) -> dict[str, str]:
    capsys.readouterr()
    run(info=True, **options)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("note:")]
    return {line.split()[0]: line[11:] for line in lines}


def test_info_says_what_a_file_holds_and_whether_it_fits_the_paper(tmp_path, capsys) -> None:
    network, model = random_network(U=9, features=128)
    save_weights(tmp_path / "w.safetensors", network, model, {"scales": [2, 3, 4], "origin": "a\x1b[31mb"})
    said = info(capsys, input=tmp_path / "w.safetensors")
    assert said["structure"].startswith("DRRN_B1U9:")
    assert said["d"] == "20 layers"
    assert said["k"].startswith("297,216 ")  # Sec. 4.3
    assert (said["form"], said["norm"], said["paper"]) == ("drrn", "batch", "fits it")
    assert (said["scales"], said["origin"]) == ("×2, ×3, ×4", "a\\x1b[31mb")
    said = info(capsys, input=port_file(tmp_path), U=25)
    assert said["d"] == "52 layers"
    for words in ("no BatchNorm", "no biases", "a ReLU on every identity", "4 features"):
        assert words in said["paper"]
    assert list(tmp_path.glob("*.safetensors")) == [tmp_path / "w.safetensors"]


def test_from_the_shell(tmp_path) -> None:
    """Refusals are one line and exit code 2; hostile files run nothing."""
    marker = tmp_path / "ran"
    evil = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    buffer = tmp_path / "B1U1.pth"
    torch.save({"model": 1}, buffer)
    buffer.write_bytes(
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}U\rlittle_endian\x88s." + evil
    )
    arguments = [f"input={buffer}", f"output={tmp_path / 'w.safetensors'}"]
    done = subprocess.run(
        [sys.executable, SRC / "convert.py", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "posix.system" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not marker.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["B1U1.pth"]


# ------------------------------------------------------------------ the real Caffe VDSR


def test_the_caffe_vdsr_through_convert_to_a_photograph(tmp_path) -> None:
    folder = os.environ.get("DRRN_WEIGHTS")
    if folder is None and "DRRN_DATA" in os.environ:
        folder = Path(os.environ["DRRN_DATA"]).parent / "weights"
    path = Path(folder or "nowhere") / "vdsr_291_adam.caffemodel"
    if not path.is_file():
        pytest.skip("vdsr_291_adam.caffemodel of huangzehao/caffe-vdsr is not there: set DRRN_WEIGHTS to its folder")
    from drrn.protocol import prepare, score

    run(input=path, output=tmp_path / "vdsr.safetensors")
    network, about = load_network(tmp_path / "vdsr.safetensors")
    assert about["source"]["sha256"] == "9199251105e65ccbe3c720192366383e12fca21afaa71a792595b13eb2d8ae9d"
    assert structure_name(about["model"]) == "VDSR_d20_64f_noBN_noinputReLU"
    gains = []
    for scale in (2, 3, 4):
        x, truth = prepare(skimage.data.camera()[180:276, 200:296], scale)
        with torch.inference_mode():
            y = network(torch.from_numpy(x.astype(np.float32))[None, None])[0, 0].numpy()
        gains.append(score(y, truth, scale)["psnr"] - score(x, truth, scale)["psnr"])
    assert min(gains) > 1, gains  # dB over bicubic


# ------------------------------------------------------------------ to elsewhere


def test_onnx(tmp_path, capsys) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    network, model = random_network(U=3, features=128)  # as many weights as B1U25
    save_weights(tmp_path / "w.safetensors", network, model, {"scales": [2, 4], "origin": "here"})
    run(input=tmp_path / "w.safetensors", output=tmp_path / "w.onnx", form="onnx")
    data = (tmp_path / "w.onnx").read_bytes()
    assert str(SRC).encode() not in data  # nothing of this machine
    loaded = onnx.load_from_string(data)
    sizes = [int(np.prod(t.dims)) for t in loaded.graph.initializer if len(t.dims) == 4]
    assert sum(sizes) == network.conv_weight_count == 297_216  # shared ones once
    norms = sum(4 * 4 * m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert 297_216 * 4 + norms < len(data) < 297_216 * 4 + norms + 60_000  # the graph itself
    axes = [d.dim_param or d.dim_value for d in loaded.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["N", 1, "height", "width"]
    facts = {p.key: p.value for p in loaded.metadata_props}
    assert facts["scales"] == "2,4"
    assert "rgb2ycbcr" in facts["input"]
    assert "Cb and Cr" in facts["colour"]
    assert json.loads(facts["drrn"])["model"] == model
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for height, width in ((2, 2), (5, 9), (64, 31)):
        x = photograph(height, width)
        with torch.no_grad():
            ours = network(x).numpy()
        assert np.abs(ours - x.numpy()).max() > 1e-3
        theirs = session.run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5 * max(1, np.abs(ours).max()))


def test_onnx_of_a_scale_enlarges_colour_as_upscale_does(tmp_path) -> None:
    """On photographs, in a batch, to one grey level; also of a network that takes the low-resolution image."""
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    network, model = random_network(B=1, U=1)
    save_weights(tmp_path / "w.safetensors", network, model, {"scales": [2, 3]})
    run(input=tmp_path / "w.safetensors", output=tmp_path / "x3.onnx", scale=3)
    session = runtime.InferenceSession((tmp_path / "x3.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["N", 3, "height", "width"]
    assert session.get_outputs()[0].shape == ["N", 3, "3*height", "3*width"]
    assert "R, G, B" in session.get_modelmeta().custom_metadata_map["input"]
    small = FSRCNN(2, 8, 4, 1).eval()
    whole = skimage.data.chelsea()
    photos = np.stack([whole[20:63, 100:150], whole[150:193, 200:250]])
    x = (photos / 255).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        results = (
            (3, network, session.run(None, {"x": x})[0]),
            (2, small, Enlarger(small, 2)(torch.from_numpy(x)).numpy()),
        )
    for scale, of, result in results:
        for photo, theirs in zip(photos, np.rint(result.transpose(0, 2, 3, 1) * 255), strict=True):
            ours = drrn.upscale(photo, scale, of, precision="float32")
            assert np.abs(theirs - ours).max() <= 1
            assert np.abs(ours.astype(int) - drrn.upscale(photo, scale, "bicubic")).max() > 3  # the network counts
    with pytest.raises(UserError, match="scale = 2: only"):
        run(input=tmp_path / "w.safetensors", output=tmp_path / "y.safetensors", scale=2)
    save_weights(
        tmp_path / "small.safetensors", small, {"network": "fsrcnn", "scale": 2, "features": 8, "s": 4, "m": 1}, {}
    )
    with pytest.raises(UserError, match="enlarges by 2"):
        run(input=tmp_path / "small.safetensors", output=tmp_path / "y.onnx", scale=3)


def test_torch_export(tmp_path) -> None:
    network, model = random_network(B=2, rectified_identity=True)
    save_weights(tmp_path / "w.safetensors", network, model, {"scales": [3]})
    run(input=tmp_path / "w.safetensors", output=tmp_path / "w.pt2")
    assert str(SRC).encode() not in (tmp_path / "w.pt2").read_bytes()
    extra = {"drrn.json": ""}
    program = torch.export.load(tmp_path / "w.pt2", extra_files=extra).module()
    said = json.loads(extra["drrn.json"])
    assert said["scales"] == [3]
    assert said["drrn"]["model"] == model
    for height, width in ((2, 7), (33, 18)):
        x = photograph(height, width)
        with torch.no_grad():
            np.testing.assert_allclose(program(x).numpy(), network(x).numpy(), atol=1e-5)


class Toy(nn.Module):
    """A user's own network: only the members that `drrn.networks` requires."""

    input, loss = "interpolated", "euclidean"

    def __init__(self, width: int, gain: float = 1.0, deep: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 5, padding=2)
        self.gain, self.depth, self.receptive_radius = gain, 2, 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.second(self.first(x).relu())


def test_a_network_of_ones_own_is_saved_converted_and_exported(tmp_path, monkeypatch, capsys) -> None:
    """It needs only a line in NETWORKS."""
    monkeypatch.setitem(NETWORKS, "toy", Toy)
    structure = {"network": "toy", "width": 4, "gain": 0.5, "deep": False}
    network, x = Toy(4, 0.5).eval(), photograph(13, 9)
    path = tmp_path / "toy.safetensors"
    save_weights(path, network, structure, {"scales": [2], "origin": "here"})
    run(input=path, output=tmp_path / "again.safetensors")
    run(input=path, output=tmp_path / "toy.pt2")
    back, about = load_network(tmp_path / "again.safetensors")
    program = torch.export.load(tmp_path / "toy.pt2").module()
    assert about["model"] == structure
    with torch.no_grad():
        assert torch.equal(back(x), network(x))
        torch.testing.assert_close(program(x), network(x), atol=1e-5, rtol=0)
    said = info(capsys, input=path)
    assert said["structure"].startswith("Toy_width4_gain0.5: ")
    assert said["k"].startswith("136 ")
    assert digest(initial_state(path, structure)) == digest(network.state_dict())
    with pytest.raises(UserError, match=r"model\.width=4"):
        initial_state(path, {**structure, "width": 5})
    with pytest.raises(UserError, match=r"model\.network=toy model\.width=4"):
        initial_state(path, random_network()[1])
    for wrong, words in (
        ({"network": "toi"}, "toi"), ({"width": "4"}, "width"), ({"width": 10**9}, "more than any"),
        ({"width": 5}, "structure has"), ({"deep": 1}, "deep"), ({"depth": 3}, "depth"), ({"gain": True}, "gain"),
    ):  # fmt: skip
        path.write_bytes(rewritten((tmp_path / "again.safetensors").read_bytes(), model={**structure, **wrong}))
        with pytest.raises(UserError, match=words):
            load_network(path)


def test_an_export_that_differs_is_refused() -> None:
    from drrn.weights.export import largest_difference

    network, _ = random_network()
    assert largest_difference(network, lambda x: network(x) + 1e-6) == pytest.approx(1e-6, rel=0.5)
    for wrong in (lambda x: network(x) + 1e-4, lambda x: network(x)[..., 1:], lambda x: network(x) * torch.nan):
        with pytest.raises(UserError, match="differs"):
            largest_difference(network, wrong)


# ------------------------------------------------------------------ fine-tuning


def test_initial_state_needs_the_same_structure(tmp_path) -> None:
    network, model = random_network(rectified_identity=True)
    path = tmp_path / "w.safetensors"
    save_weights(path, network, model, {})
    assert digest(initial_state(path, model)) == digest(network.state_dict())
    other = {**model, "U": 9, "norm": "none", "rectified_identity": False}
    with pytest.raises(UserError, match=r"model\.U=2 model\.norm=batch model\.rectified_identity=true"):
        initial_state(path, other)


def test_training_starts_from_the_file(tiny_images, tmp_path) -> None:
    """After one step at a rate of almost 0, the weights are the file's; BatchNorm's averages start anew."""
    network, model = random_network(U=1, features=3)
    path = tmp_path / "weights.safetensors"
    save_weights(path, network, model, {})
    arguments = [
        f"init_from={path}", f"output={tmp_path / 'runs'}", "optim=quick", "optim.lr=1e-12",
        f"data.train=[{tiny_images}]", f"data.val=[{tiny_images}]",
        "trainer.max_steps=1", "trainer.accelerator=cpu", "logger=none",
        "data.num_workers=0", "data.batch_size=2", "data.scales=[4]", "data.val_scales=[4]",
    ]  # fmt: skip

    def config(*more: str):
        with initialize_config_dir(CONF, version_base="1.3"):
            return request(compose("config", [*arguments, *more]), more)

    with pytest.raises(UserError, match=r"model\.U=1"):
        train.start(config("model.U=2"))
    with pytest.raises(UserError, match="init_from and ckpt_path"):
        config(f"ckpt_path={path}")
    with pytest.raises(UserError, match=r"nowhere\.ckpt"):
        config("init_from=nowhere.ckpt")
    assert config("ckpt_path=last").init_from == str(path)  # resumes this fine-tuning
    assert config("init_from=DRRN_B1U5_32f").model["U"] == 5  # weights that are shipped, by their name
    assert config(f"init_from={tmp_path}") == config()  # of a run, by its folder
    assert config().model == model  # nothing else about the network has to be typed
    assert not (tmp_path / "runs").exists()

    train.start(config())
    [folder] = (tmp_path / "runs" / "main").iterdir()
    after = load_network(folder / "weights.safetensors")[0].state_dict()
    before = network.state_dict()
    for name in (name for name in before if not name.endswith(("mean", "var", "tracked"))):
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    assert json.loads((folder / "record.json").read_text())["config"]["init_from"] == str(path)


def test_keys_that_came_later_leave_earlier_runs_their_folders() -> None:
    from drrn.config import Config, DataConfig, LoggerConfig, OptimConfig, TrainerConfig
    from drrn.identity import identity

    config = Config(in_full(STRUCTURE), DataConfig(), OptimConfig(), TrainerConfig(), LoggerConfig(), seed=1)
    before = identity(config)
    assert before["model"] == STRUCTURE
    assert "init_from" not in before
    config.model["rectified_identity"], config.init_from = True, "w.safetensors"
    after = identity(config)
    assert after["model"] == {**STRUCTURE, "rectified_identity": True}
    assert after["init_from"] == "w.safetensors"


@pytest.mark.parametrize(("changes", "name"), [
    ({"rectified_identity": True, "norm": "none", "bias": False}, "DRRN_B1U2_6f_noBN_rectified_nobias"),
    ({"U": 0, "B": 19, "input_relu": False, "features": 128}, "VDSR_d20_noinputReLU"),
])  # fmt: skip
def test_structures_with_a_switch_on_have_names_of_their_own(changes, name) -> None:
    assert structure_name(in_full({**STRUCTURE, **changes})) == name


def test_the_forward_without_switches_is_the_papers() -> None:
    """Eq. 4 to 9 by torch's functions, from the state dict."""
    network, _ = random_network(B=2, U=2)
    s, x = network.state_dict(), photograph(11, 13)

    def layer(h: torch.Tensor, conv: str, norm: str) -> torch.Tensor:
        n = [s[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.conv2d(F.batch_norm(h, *n).relu(), s[f"{conv}.weight"], s[f"{conv}.bias"], padding=1)

    h = x
    for b in range(2):
        h0 = h = layer(h, f"blocks.{b}.conv", f"blocks.{b}.norm")
        for u in range(2):
            a = layer(h, f"blocks.{b}.conv_a.0", f"blocks.{b}.norm_a.{u}")
            h = layer(a, f"blocks.{b}.conv_b.0", f"blocks.{b}.norm_b.{u}") + h0
    with torch.no_grad():
        torch.testing.assert_close(network(x), layer(h, "conv_rec", "norm_rec") + x)
