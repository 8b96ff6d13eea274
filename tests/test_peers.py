"""The paper's other networks: counts, each structure against its equations written out again, then in a training."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from drrn.config import OptimConfig
from drrn.drcn import DRCN
from drrn.errors import UserError
from drrn.espcn import ESPCN
from drrn.fsrcnn import FSRCNN
from drrn.identity import run_dir
from drrn.images import read_pixels
from drrn.inference import super_resolve
from drrn.layers import conv_weights
from drrn.matlab import imresize, to_uint8
from drrn.module import SuperResolution
from drrn.networks import NETWORKS, build, complete, on_paper
from drrn.optimisers import configured
from drrn.pairs import low_pairs
from drrn.red30 import RED30
from drrn.resnet import ResNet
from drrn.runs import start as train
from drrn.runs.checkpoints import newest_checkpoint
from drrn.srcnn import SRCNN
from drrn.weights.ours import initial_state, load_network, save_weights
from test_module import optim

ROOT = Path(__file__).resolve().parents[1]

# name → structure, and d, k as the papers have them.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "SRCNN 9-1-5": ({"network": "srcnn"}, 3, 8_032),
    "SRCNN 9-5-5": ({"network": "srcnn", "middle": 5}, 3, 57_184),
    "FSRCNN ×2": ({"network": "fsrcnn", "scale": 2}, 8, 12_464),
    "FSRCNN ×4": ({"network": "fsrcnn", "scale": 4}, 8, 12_464),
    "ESPCN ×2": ({"network": "espcn", "scale": 2}, 3, 20_032 + 288 * 4),
    "ESPCN ×3": ({"network": "espcn", "scale": 3}, 3, 20_032 + 288 * 9),
    "VDSR": ({"B": 19, "U": 0, "features": 64}, 20, 664_704),
    "DRCN": ({"network": "drcn"}, 20, 1_774_080),
    "RED30": ({"network": "red30"}, 30, 4_131_072),
    "ResNet, U = 1": ({"network": "resnet", "U": 1}, 4, 2_304 + 294_912),
    "ResNet, U = 9": ({"network": "resnet", "U": 9}, 20, 2_304 + 294_912 * 9),
}
# Structures small enough to be trained here, with the keys that a run of them needs.
SMALL: dict[str, tuple[str, ...]] = {
    "srcnn": ("model=srcnn", "model.features=4"),
    "fsrcnn": ("model=fsrcnn", "model.features=4", "model.s=2", "model.m=2"),
    "espcn": ("model=espcn", "model.features=4"),
    "drcn": ("model=drcn", "model.T=3", "model.features=3", "model.alpha_steps=5"),
    "red30": ("model=red30", "model.layers=4", "model.features=3"),
    "resnet": ("model=resnet", "model.U=2", "model.features=3"),
    "vdsr_plain": ("model=vdsr_plain", "model.B=3", "model.features=3"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_depth_and_weights_are_those_of_the_papers(name: str) -> None:
    structure, depth, weights = PUBLISHED[name]
    network = on_paper(structure)
    assert (network.depth, conv_weights(network)) == (depth, weights)


def test_the_ratios_that_the_paper_prints() -> None:
    """Sec. 1: DRRN has 2, 6 and 14 times fewer weights than VDSR, DRCN and RED30."""
    drrn = on_paper({"B": 1, "U": 25}).conv_weight_count
    assert [round(PUBLISHED[name][2] / drrn, 2) for name in ("VDSR", "DRCN", "RED30")] == [2.24, 5.97, 13.9]


def test_every_network_is_in_conf_and_takes_what_its_yaml_has(configure: Callable) -> None:
    names = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    assert set(NETWORKS) <= names
    for name in set(NETWORKS) - {"drrn"}:
        given = configure(f"model={name}", "data.scales=[3]", "data.val_scales=[3]", tiny=False).model
        assert given["network"] == name
        assert isinstance(build({**given, "features": 2} if "features" in given else given), NETWORKS[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_layer_of_another_rate_is_the_one_that_computes_last(name: str) -> None:
    settings = OptimConfig(**optim(lr=0.5, bias_lr_mult=0.25, last_lr_mult=0.1))
    network, order = on_paper(PUBLISHED[name][0]), []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(lambda layer, *_: order.append(layer))
    network.eval()(torch.zeros(1, 1, 8, 8, device="meta"))
    optimizer, _ = configured(network, settings, 1, 10, fused=False)
    rates = {group["lr"]: group["params"] for group in optimizer.param_groups}
    assert rates.keys() == {0.5, 0.125, 0.05}
    assert optimizer.param_groups[0]["lr"] == 0.5  # γ of the clipping
    assert set(rates[0.05]) == set(order[-1].parameters())
    assert set(rates[0.125]) == {layer.bias for layer in order if layer is not order[-1]}
    assert sum(map(len, rates.values())) == len(list(network.parameters()))


# ------------------------------------------------------------------ the equations, written out again


def randomised(network: nn.Module) -> nn.Module:
    """Weights, biases and statistics that no two layers share, so that none can be mistaken for another."""
    generator = torch.Generator().manual_seed(1)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.4 - 0.15)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.abs_().add_(0.5)
    return network.eval().double()


def convolved(x: np.ndarray, weight: Tensor, bias: Tensor) -> np.ndarray:
    """[C, H, W] → [C', H, W]: the definition of a convolution with zeros around the image, in loops."""
    weight, bias = weight.detach().numpy(), bias.detach().numpy()
    radius = weight.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (radius, radius), (radius, radius)))
    y = np.empty((len(weight), *x.shape[1:]))
    for i, j in np.ndindex(*x.shape[1:]):
        piece = padded[:, i : i + 2 * radius + 1, j : j + 2 * radius + 1]
        y[:, i, j] = (weight * piece).sum((1, 2, 3)) + bias
    return y


def transposed(x: np.ndarray, weight: Tensor, bias: Tensor, stride: int = 1) -> np.ndarray:
    """[C, H, W] → [C', s·H, s·W]: each pixel of x puts its filters around its place in the result."""
    weight, bias = weight.detach().numpy(), bias.detach().numpy()
    size = weight.shape[-1]
    y = np.zeros((weight.shape[1], stride * x.shape[1] + 2 * size, stride * x.shape[2] + 2 * size))
    for i, j in np.ndindex(*x.shape[1:]):
        top, left = size + stride * i - size // 2, size + stride * j - size // 2
        y[:, top : top + size, left : left + size] += np.einsum("c,cdij->dij", x[:, i, j], weight)
    return y[:, size:-size, size:-size] + bias[:, None, None]


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def by_hand_srcnn(n: SRCNN, x: np.ndarray) -> np.ndarray:
    f1 = relu(convolved(x, n.conv1.weight, n.conv1.bias))
    return convolved(relu(convolved(f1, n.conv2.weight, n.conv2.bias)), n.conv3.weight, n.conv3.bias)


def by_hand_fsrcnn(n: FSRCNN, x: np.ndarray) -> np.ndarray:
    layers = [*n.extract, *n.shrink, *n.map, *n.expand]
    for conv, prelu in zip(layers[::2], layers[1::2], strict=True):
        x = convolved(x, conv.weight, conv.bias)
        x = np.where(x > 0, x, prelu.weight.detach().numpy()[:, None, None] * x)
    return transposed(x, n.deconv.weight, n.deconv.bias, n.scale)


def by_hand_espcn(n: ESPCN, x: np.ndarray) -> np.ndarray:
    r = n.scale
    f1 = np.tanh(convolved(x, n.conv1.weight, n.conv1.bias))
    maps = convolved(np.tanh(convolved(f1, n.conv2.weight, n.conv2.bias)), n.conv3.weight, n.conv3.bias)
    y = np.empty((1, r * x.shape[1], r * x.shape[2]))
    for i, j in np.ndindex(*y.shape[1:]):
        y[0, i, j] = maps[r * (i % r) + j % r, i // r, j // r]  # Eq. 4 of its paper
    return y


def by_hand_red30(n: RED30, x: np.ndarray) -> np.ndarray:
    h = [x]
    for conv in n.convs:
        h.append(relu(convolved(h[-1], conv.weight, conv.bias)))
    g, count = h[-1], len(n.convs)
    for j, deconv in enumerate(n.deconvs, start=1):
        g = transposed(g, deconv.weight, deconv.bias)
        g = relu(g + h[count - j] if (count - j) % 2 == 0 else g)
    return transposed(g, n.conv_rec.weight, n.conv_rec.bias) + x


def by_hand_resnet(n: ResNet, x: np.ndarray) -> np.ndarray:
    def normalised(z: np.ndarray, norm: nn.BatchNorm2d) -> np.ndarray:
        mean, var, gain, shift = (
            t.detach().numpy()[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        return (z - mean) / np.sqrt(var + norm.eps) * gain + shift

    h = relu(normalised(convolved(x, n.conv1.weight, n.conv1.bias), n.norm1))
    for unit in n.units:
        f = relu(normalised(convolved(h, unit.conv1.weight, unit.conv1.bias), unit.norm1))
        h = relu(normalised(convolved(f, unit.conv2.weight, unit.conv2.bias), unit.norm2) + h)  # Eq. 1
    return convolved(h, n.rec.weight, n.rec.bias)


def by_hand_drcn(n: DRCN, x: np.ndarray) -> np.ndarray:
    h = relu(convolved(x, n.embed1.weight, n.embed1.bias))
    h = relu(convolved(h, n.embed2.weight, n.embed2.bias))
    y = 0
    for t in range(n.T):
        h = relu(convolved(h, n.recursion.weight, n.recursion.bias))
        rec = convolved(relu(convolved(h, n.rec1.weight, n.rec1.bias)), n.conv_rec.weight, n.conv_rec.bias)
        y = y + float(n.w[t].detach()) * (rec + x)  # Eq. 2
    return y


WRITTEN_OUT: dict[str, tuple[nn.Module, Callable[[Any, np.ndarray], np.ndarray]]] = {
    "SRCNN 9-1-5": (SRCNN(features=4), by_hand_srcnn),
    "SRCNN 9-5-5": (SRCNN(5, features=4), by_hand_srcnn),
    "FSRCNN ×2": (FSRCNN(2, 3, s=2, m=2), by_hand_fsrcnn),
    "FSRCNN ×3": (FSRCNN(3, 3, s=2, m=1), by_hand_fsrcnn),
    "FSRCNN ×4": (FSRCNN(4, 3, s=2, m=2), by_hand_fsrcnn),
    "ESPCN ×2": (ESPCN(2, features=4), by_hand_espcn),
    "ESPCN ×3": (ESPCN(3, features=4), by_hand_espcn),
    "RED30": (RED30(features=2), by_hand_red30),
    "RED, even": (RED30(layers=4, features=3), by_hand_red30),
    "ResNet": (ResNet(U=2, features=3), by_hand_resnet),
    "DRCN": (DRCN(T=3, features=3), by_hand_drcn),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_forward_is_what_the_equations_say(name: str) -> None:
    network, by_hand = WRITTEN_OUT[name]
    network = randomised(network)
    x = np.random.default_rng(0).random((1, 7, 8))
    with torch.inference_mode():
        y = network(torch.from_numpy(x)[None])[0].numpy()
    expected = by_hand(network, x)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_the_receptive_radius_is_how_far_an_output_pixel_sees(name: str) -> None:
    network = WRITTEN_OUT[name][0].double().eval()
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 0.01)  # nothing cancels
    radius, scale = network.receptive_radius, getattr(network, "scale", 1)
    side = 2 * radius + 5
    x = torch.full((1, 1, side, side), 0.5, dtype=torch.float64, requires_grad=True)
    seen = []
    middle = side // 2
    for i in range(scale * middle, scale * middle + scale):
        (gradient,) = torch.autograd.grad(network(x)[0, 0, i, i], x)
        rows = gradient[0, 0].abs().sum(1).nonzero()
        seen += [middle - int(rows.min()), int(rows.max()) - middle]
    assert max(seen) == radius


def test_the_first_layers_see_the_image_in_float32_under_autocast() -> None:
    for network, _ in WRITTEN_OUT.values():
        network = network.float().eval()
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        got: list[torch.dtype] = []
        handle = first.register_forward_hook(lambda _, x, y, got=got: got.extend([x[0].dtype, y.dtype]))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            network(torch.rand(1, 1, 6, 6))
        handle.remove()
        assert got == [torch.float32, torch.float32], type(network)


# ------------------------------------------------------------------ DRCN's loss


def test_drcn_supervises_every_recursion_and_alpha_falls_with_the_step() -> None:
    network = DRCN(T=3, features=2, alpha_steps=8).train()
    x, truth = torch.rand(2, 1, 5, 6), torch.rand(2, 1, 5, 6)
    y, *estimates = network(x).split(1, dim=1)
    assert len(estimates) == 3
    torch.testing.assert_close(y, sum(w * e for w, e in zip(network.w, estimates, strict=True)))
    torch.testing.assert_close(y, network.eval()(x))

    def half_of_the_squares(z: Tensor) -> float:
        return float(((z - truth) ** 2).sum().detach()) / 2 / len(x)

    for step, alpha in ((0, 1.0), (2, 0.75), (8, 0.0), (100, 0.0)):
        network.at_step(step)
        expected = alpha * np.mean([half_of_the_squares(e) for e in estimates]) + (1 - alpha) * half_of_the_squares(y)
        loss = network.loss(torch.cat([y, *estimates], dim=1), truth)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_drcn_starts_as_the_identity_and_its_alpha_is_in_no_file() -> None:
    network = DRCN(T=2, features=3)
    h = torch.rand(1, 3, 5, 5)
    torch.testing.assert_close(network.recursion(h), h)
    assert "alpha" not in network.state_dict()


def test_a_loss_beside_the_networks_own_is_refused(configure: Callable) -> None:
    config = configure(*SMALL["drcn"], "optim.loss=l1", tiny=False)
    with pytest.raises(UserError, match=r"optim\.loss = l1: the network has"):
        SuperResolution(config.model, vars(config.optim))


# ------------------------------------------------------------------ pairs with the low-resolution image


@pytest.mark.parametrize(("scale", "side", "small"), [(2, 30, 15), (3, 30, 10), (4, 28, 7)])
def test_low_pairs_are_the_cropped_patch_and_its_bicubic_shrinking(scale: int, side: int, small: int) -> None:
    truth = torch.rand(3, 31, 31, generator=torch.Generator().manual_seed(0))
    low, cropped = low_pairs(truth, scale)
    assert low.shape == (3, small, small)
    assert torch.equal(cropped, truth[:, :side, :side])
    for a, b in zip(low, cropped, strict=True):
        np.testing.assert_allclose(a.numpy(), imresize(b.numpy(), 1 / scale), atol=1e-6)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.network=edsr",), "model.network = 'edsr': allowed are drrn, drcn, espcn, fsrcnn, red30"),
        (("model=srcnn", "model.middle=word"), "model.middle"),
        (("model=srcnn", "model.middle=4"), "middle = 4: must be 1, 3 or 5"),
        (("model=srcnn", "+model.B=1"), "model.B"),
        (("model=red30", "model.layers=1"), "layers = 1: must be 2"),
        (("model=resnet", "model.norm=group"), "norm = 'group': allowed are batch, none"),
        (("model=drcn", "model.alpha_steps=0"), "alpha_steps = 0"),
        (("model=fsrcnn", "data.scales=[2,3]"), r"data.scales = [2, 3] and model.scale = 2"),
        (("model=espcn", "data.scales=[3]", "data.val_scales=[2]"), "give data.scales=[3] data.val_scales=[3]"),
        (("model=espcn", "model.features=1"), "features = 1"),
    ],
)
def test_a_wrong_structure_is_refused_by_name(overrides: tuple[str, ...], said: str, configure: Callable) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        configure(*overrides, tiny=False)


# ------------------------------------------------------------------ in the house


class Killed(Exception):
    """Raised by a test in the middle of a training."""


@pytest.fixture(scope="module", params=SMALL)
def run(request: pytest.FixtureRequest, configure: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of six steps that was killed in the fifth and resumed, beside an uninterrupted one."""
    folders = []
    keys = ("trainer.max_steps=6", "trainer.checkpoint_every=2", "trainer.val_check_interval=3", "optim.lr=0.01")
    real = SuperResolution.training_step
    for killed in (False, True):
        output = tmp_path_factory.mktemp(request.param)
        config = configure(*SMALL[request.param], *keys, f"output={output}")
        if killed:

            def training_step(self: SuperResolution, batch: Any, batch_idx: int) -> Any:
                if self.trainer.global_step == 4:
                    raise Killed
                return real(self, batch, batch_idx)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SuperResolution, "training_step", training_step)
                with pytest.raises(Killed):
                    train.start(config)
            assert newest_checkpoint(run_dir(config) / "checkpoints").name == "step00000004.ckpt"
        train.start(config)
        folders.append(run_dir(config))
    straight, resumed = folders
    assert (straight / "weights.safetensors").read_bytes() == (resumed / "weights.safetensors").read_bytes()
    one, other = (json.loads((folder / "record.json").read_text()) for folder in folders)
    for key in ("status", "validation", "scores", "means", "structure"):
        assert one[key] == other[key], key
    return resumed


def test_a_killed_training_resumes_and_its_scores_are_those_of_evaluate(
    run: Path, tiny_images: Path, entry_point: Callable, tmp_path: Path
) -> None:
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "finished"
    weights, output = run / "weights.safetensors", tmp_path / "scores.json"
    code, _, err = entry_point(
        "evaluate", f"checkpoint={weights}", f"sets=[{tiny_images}]", "scales=[2]", f"output={output}", "workers=1"
    )
    assert code == 0, err
    rows = {row["image"]: row for row in json.loads(output.read_text())["scores"]}
    for row in record["scores"]:
        for metric in ("psnr", "ssim"):
            assert rows[row["image"]][metric] == pytest.approx(row[metric], abs=1e-4)


def test_photographs_are_enlarged_whole_and_in_tiles(
    run: Path, tiny_images: Path, entry_point: Callable, tmp_path: Path
) -> None:
    network, _ = load_network(run / "weights.safetensors")
    pixels = {}
    for name, keys in (("whole", ()), ("tiles", ("tile=16",))):
        output = tmp_path / f"{name}.png"
        arguments = (f"input={tiny_images / 'camera.png'}", f"checkpoint={run / 'weights.safetensors'}", "scale=2")
        code, _, err = entry_point("upscale", *arguments, f"output={output}", *keys)
        assert code == 0, err
        pixels[name] = read_pixels(output)
    y = read_pixels(tiny_images / "camera.png") / 255.0
    x = y if network.input == "low" else imresize(y, 2)
    expected = to_uint8(super_resolve(network, x.astype(np.float32)))
    assert pixels["whole"].shape == (128, 110)
    for name, found in pixels.items():
        assert np.abs(found.astype(int) - expected).max() <= 1, name


def test_an_exported_network_is_the_same_network(run: Path, entry_point: Callable, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    output = tmp_path / "network.onnx"
    code, out, err = entry_point("convert", f"input={run / 'weights.safetensors'}", f"output={output}", "info=true")
    assert code == 0, err
    assert "differs from ours by at most" in out
    assert output.stat().st_size > 0


def test_a_network_of_one_scale_is_asked_for_no_other(
    configure: Callable, tiny_images: Path, entry_point: Callable, tmp_path: Path
) -> None:
    weights = tmp_path / "espcn.safetensors"
    structure = {"network": "espcn", "scale": 3, "features": 4}
    save_weights(weights, build(structure), structure, {})
    given = (f"checkpoint={weights}", f"output={tmp_path / 'out.json'}")
    code, _, err = entry_point("evaluate", *given, f"sets=[{tiny_images}]", "scales=[2]")
    assert (code, "enlarges by 3" in err) == (2, True)
    code, _, err = entry_point("upscale", *given[:1], f"input={tiny_images}", "scale=2", f"output={tmp_path / 'o'}")
    assert (code, "enlarges by 3" in err) == (2, True)
    given = (f"compare={tiny_images / 'chelsea.png'}", f"checkpoint=[{weights}]", f"output={tmp_path / 'report'}")
    code, _, err = entry_point("report", *given, "scale=2")
    assert (code, "enlarges by 3" in err) == (2, True)
    code, _, err = entry_point("report", *given, "scale=3")
    assert code == 0, err


def test_fsrcnn_starts_from_another_scale_and_espcn_does_not(tmp_path: Path) -> None:
    for network, said in (("fsrcnn", None), ("espcn", "add model.scale=3")):
        at3, at2 = (complete({"network": network, "features": 4, "scale": scale}) for scale in (3, 2))
        path = tmp_path / f"{network}.safetensors"
        save_weights(path, build(at3), at3, {})
        if said is None:
            build(at2).load_state_dict(initial_state(path, at2))
            continue
        with pytest.raises(UserError, match=said):
            initial_state(path, at2)


# ------------------------------------------------------------------ published weights

# Set5, ×2, ×3 and ×4, measured with the protocol (PSNR, SSIM): two published sets of weights.
MEASURED = {
    "srcnn_Y": {2: ("36.54", "0.9529"), 3: ("32.58", "0.9069"), 4: ("30.29", "0.8581")},
    "fsrcnn_Y": {2: ("37.17", "0.9567"), 3: ("33.17", "0.9142"), 4: ("30.88", "0.8715")},
}


@pytest.mark.parametrize("name", MEASURED)
def test_published_weights_measure_what_is_known_of_them(
    name: str, drrn_data: Path, entry_point: Callable, tmp_path: Path
) -> None:
    folder = os.environ.get("DRRN_WEIGHTS")
    if not folder or not (Path(folder) / f"{name}_scale2.pth").is_file():
        pytest.skip("set DRRN_WEIGHTS to the folder that holds srcnn_Y_scale2.pth and its like")
    for scale, printed in MEASURED[name].items():
        weights, output = tmp_path / f"{name}_{scale}.safetensors", tmp_path / f"{scale}.json"
        code, _, err = entry_point(
            "convert", f"input={Path(folder) / f'{name}_scale{scale}.pth'}", f"output={weights}"
        )
        assert code == 0, err
        given = (f"checkpoint={weights}", "sets=[Set5]", f"root={drrn_data}", f"scales=[{scale}]")
        code, _, err = entry_point("evaluate", *given, f"output={output}", "workers=1")
        assert code == 0, err
        (mean,) = json.loads(output.read_text())["means"]
        assert (f"{mean['psnr']:.2f}", f"{mean['ssim']:.4f}") == printed
