"""`drrn.model` against the paper's equations and numbers, and against a plain-functional version of them."""

from __future__ import annotations

import math
import os
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drrn.model import DRRN

# The structures that the paper names: (arguments, d, k). k of B2U3 is printed as 784K in Sec. 4.3, which the rule
# behind every other count contradicts: an erratum, see data/paper/fig6.csv.
PAPER = {
    "B1U3": (dict(B=1, U=3), 8, 297_216),
    "B2U3": (dict(B=2, U=3), 15, 739_584),
    "B3U3": (dict(B=3, U=3), 22, 1_181_952),
    "B4U3": (dict(B=4, U=3), 29, 1_624_320),
    "B3U1": (dict(B=3, U=1), 10, 1_181_952),
    "B3U2": (dict(B=3, U=2), 16, 1_181_952),
    "B3U4": (dict(B=3, U=4), 28, 1_181_952),
    "B1U9": (dict(B=1, U=9), 20, 297_216),
    "B1U25": (dict(B=1, U=25), 52, 297_216),
    "B3U8": (dict(B=3, U=8), 52, 1_181_952),
    "B17U1": (dict(B=17, U=1), 52, 7_375_104),
    "NS_B3U4": (dict(B=3, U=4, weight_sharing=False), 28, 3_836_160),
    "C_B3U4": (dict(B=3, U=4, multi_path=False), 28, 1_181_952),
    "NS_C_B3U4": (dict(B=3, U=4, weight_sharing=False, multi_path=False), 28, 3_836_160),
    "VDSR_d28": (dict(B=27, U=0), 28, 3_836_160),
    "VDSR_release": (dict(B=19, U=0, features=64), 20, 664_704),
}
FAMILY = [
    dict(B=b, U=u, weight_sharing=ws, multi_path=mp, norm=norm, bias=bias)
    for (b, u), ws, mp, norm, bias in product(
        [(1, 3), (2, 2)], [True, False], [True, False], ["batch", "none"], [True, False]
    )
] + [dict(B=4, U=0, norm=norm, bias=bias) for norm, bias in product(["batch", "none"], [True, False])]
PORTS = [  # the arguments of networks read from ports, see release.md
    dict(B=1, U=3, norm="none", bias=False, rectified_identity=True),
    dict(B=2, U=2, norm="none", rectified_identity=True, multi_path=False),
    dict(B=4, U=0, norm="none", input_relu=False),
    dict(B=2, U=2, norm="batch", input_relu=False),
]


def ids(arguments: object) -> str | None:
    return ",".join(f"{key}={value}" for key, value in arguments.items()) if isinstance(arguments, dict) else None


def lively(network: DRRN, seed: int = 0) -> DRRN:
    """Random values everywhere, BatchNorm's affine and statistics and the biases included; float64."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=generator)
            if name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
                tensor.abs_().add_(0.5)
    return network.double()


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", PAPER)
def test_depth_and_weight_count_of_the_papers_structures(name: str) -> None:
    arguments, depth, weights = PAPER[name]
    network = DRRN(**arguments)
    assert network.depth == depth
    assert network.conv_weight_count == weights


def test_the_erratum_of_sec_4_3() -> None:
    """B2U3 by hand: two blocks of three convolutions and the last one. The paper's 784K is wrong."""
    by_hand = (9 * 128 + 2 * 9 * 128**2) + 3 * 9 * 128**2 + 9 * 128
    assert DRRN(2, 3).conv_weight_count == by_hand == 739_584
    assert round(by_hand / 1000) != 784


@pytest.mark.parametrize(("B", "U"), [(3, 2), (3, 3), (3, 4)])
def test_vdsr_and_ns_of_equal_depth_have_equal_counts(B: int, U: int) -> None:
    """Fig. 8 compares them at d = 16, 22, 28."""
    ns = DRRN(B, U, weight_sharing=False)
    vdsr = DRRN(ns.depth - 1, 0)
    assert vdsr.depth == ns.depth
    assert vdsr.conv_weight_count == ns.conv_weight_count


@pytest.mark.parametrize("name", [name for name in PAPER if PAPER[name][1] <= 28])
def test_depth_is_the_number_of_convolutions_that_an_input_passes(name: str) -> None:
    arguments, depth, _ = PAPER[name]
    network = DRRN(**{**arguments, "features": 2}).eval()
    passed = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: passed.append(1))
    network(torch.rand(1, 1, 4, 4))
    assert len(passed) == depth


@pytest.mark.parametrize(
    "arguments",
    [
        dict(B=1, U=1),
        dict(B=1, U=3),
        dict(B=2, U=2),
        dict(B=2, U=1, multi_path=False),
        dict(B=1, U=2, weight_sharing=False),
        dict(B=6, U=0),
    ],
    ids=ids,
)
def test_receptive_radius_is_where_the_output_changes(arguments: dict) -> None:
    """A perturbed pixel changes the output up to `receptive_radius` away, and nothing further out."""
    network = DRRN(**arguments, features=3, norm="none", bias=False).double()
    for parameter in network.parameters():  # all positive: no ReLU cuts a path
        nn.init.uniform_(parameter, 0.05, 0.1)
    radius = network.receptive_radius
    side = 2 * radius + 7
    x = torch.rand(1, 1, side, side, dtype=torch.float64)
    y = x.clone()
    centre = side // 2
    y[0, 0, centre, centre] += 0.5
    with torch.no_grad():
        rows, columns = torch.nonzero((network(y) - network(x))[0, 0], as_tuple=True)
    for positions in (rows, columns):
        assert positions.min() == centre - radius
        assert positions.max() == centre + radius
    assert len(rows) == (2 * radius + 1) ** 2


# ---------------------------------------------------------------------- what is shared


def test_the_units_of_a_block_share_their_convolutions_and_nothing_else() -> None:
    network = DRRN(B=2, U=5, features=4)
    for block in network.blocks:
        uses: dict[int, int] = {}
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
            conv.register_forward_hook(
                lambda m, *_, uses=uses: uses.update({id(m.weight): uses.get(id(m.weight), 0) + 1})
            )
        network.eval()(torch.rand(1, 1, 5, 5))
        assert sorted(uses.values()) == [1, 5, 5]  # f_b once, the two of the residual function U times
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len({id(m.weight) for m in norms}) == len(norms) == 1 + 2 * 5
        assert len({m.running_mean.data_ptr() for m in norms}) == len(norms)
    assert not {id(p) for p in network.blocks[0].parameters()} & {id(p) for p in network.blocks[1].parameters()}


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_what_the_state_dict_holds(sharing: bool, norm: str) -> None:
    """Shared tensors are stored once, so B1U25 is as small on disk as B1U9, except its BatchNorms."""
    B, U = 2, 4
    network = DRRN(B, U, features=4, norm=norm, weight_sharing=sharing)
    state = network.state_dict()
    convs = B * (1 + 2 * (1 if sharing else U)) + 1
    norms = (B * (1 + 2 * U) + 1) if norm == "batch" else 0
    assert len(state) == 2 * convs + 5 * norms  # weight and bias; BatchNorm's five tensors
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    assert len(list(network.parameters())) == 2 * convs + 2 * norms


def test_a_step_on_a_shared_weight_moves_every_unit() -> None:
    """Changing the one tensor changes what each unit of the block computes."""
    network = lively(DRRN(1, 3, features=3)).eval()
    outputs: list[Tensor] = []
    block = network.blocks[0]
    residual = block.residual
    block.residual = lambda H, u: outputs.append(residual(H, u)) or outputs[-1]
    x = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        network(x)
        before = list(outputs)
        outputs.clear()
        block.conv_b[0].bias.add_(1.0)
        network(x)
    assert len(before) == len(outputs) == 3
    torch.testing.assert_close(outputs[0], before[0] + 1.0)
    assert all(not torch.allclose(a, b) for a, b in zip(before, outputs, strict=True))


# ---------------------------------------------------------------------- Eq. 4–9


def normalised(H: Tensor, state: dict[str, Tensor], name: str, training: bool) -> Tensor:
    """BatchNorm by its definition, or nothing when the network has none there."""
    if f"{name}.weight" not in state:
        return H
    if training:
        mean, var = H.mean((0, 2, 3)), H.var((0, 2, 3), unbiased=False)
    else:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    scale = state[f"{name}.weight"] / torch.sqrt(var + 1e-5)
    shape = (1, -1, 1, 1)
    return (H - mean.view(shape)) * scale.view(shape) + state[f"{name}.bias"].view(shape)


def layer(H: Tensor, state: dict[str, Tensor], norm: str, conv: str, training: bool, relu: bool = True) -> Tensor:
    """BN-ReLU-conv, the weight layer of Fig. 3."""
    active = normalised(H, state, norm, training)
    if relu:
        active = active.clamp(min=0)
    return F.conv2d(F.pad(active, (1, 1, 1, 1)), state[f"{conv}.weight"], state.get(f"{conv}.bias"))


def equations(
    x: Tensor,
    state: dict[str, Tensor],
    B: int,
    U: int,
    weight_sharing: bool = True,
    multi_path: bool = True,
    rectified_identity: bool = False,
    input_relu: bool = True,
    training: bool = False,
    **_: object,
) -> Tensor:
    """Eq. 9 from a state dict, without a module."""

    def identity(z: Tensor) -> Tensor:
        return z.clamp(min=0) if rectified_identity else z

    x_b = x  # x_0 = x
    for b in range(B):
        block = f"blocks.{b}"
        H0 = layer(x_b, state, f"{block}.norm", f"{block}.conv", training, relu=input_relu or b > 0)  # f_b
        H = H0.clone()
        for u in range(U):
            w = 0 if weight_sharing else u
            F_u = layer(H, state, f"{block}.norm_a.{u}", f"{block}.conv_a.{w}", training)
            F_u = layer(F_u, state, f"{block}.norm_b.{u}", f"{block}.conv_b.{w}", training)
            H = F_u + identity(H0 if multi_path else H)  # Eq. 4 (5); Eq. 3 for the chain
        x_b = H  # Eq. 6
    return layer(x_b, state, "norm_rec", "conv_rec", training) + identity(x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("arguments", [*FAMILY, *PORTS], ids=ids)
def test_forward_is_equations_4_to_9(arguments: dict, training: bool) -> None:
    network = lively(DRRN(**arguments, features=3)).train(training)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        y = network(x)
    torch.testing.assert_close(y, equations(x, state, **arguments, training=training), rtol=1e-9, atol=1e-9)
    for departure in ("rectified_identity", "input_relu"):  # the paper's network is neither port's
        if departure in arguments:
            paper = {key: value for key, value in arguments.items() if key != departure}
            assert not torch.allclose(y, equations(x, state, **paper, training=training), atol=1e-6)


def test_chain_and_multi_path_are_different_networks_from_the_second_unit_on() -> None:
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    for U, same in ((1, True), (2, False)):
        multi_path, chain = (lively(DRRN(1, U, features=3, multi_path=mp)).eval() for mp in (True, False))
        chain.load_state_dict(multi_path.state_dict())
        assert torch.allclose(multi_path(x), chain(x)) is same


@pytest.mark.parametrize("multi_path", [True, False])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_h0_is_not_overwritten(multi_path: bool, norm: str) -> None:
    """Common ports add ReLU(H⁰) to every unit, because an in-place ReLU overwrites H⁰ (release.md)."""
    network = lively(DRRN(1, 3, features=4, norm=norm, multi_path=multi_path)).eval()
    kept: list[tuple[Tensor, Tensor]] = []
    network.blocks[0].conv.register_forward_hook(lambda m, i, H0: kept.append((H0, H0.clone())))
    x = torch.rand(1, 1, 9, 9, dtype=torch.float64)
    given = x.clone()
    network(x)
    ((H0, copy),) = kept
    assert (copy < 0).any()  # else a ReLU would not show
    assert torch.equal(H0, copy)
    assert torch.equal(x, given)


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize("arguments", FAMILY, ids=ids)
def test_gradients_reach_every_parameter(arguments: dict) -> None:
    """With BatchNorm's stored statistics; with those of the batch, a bias before a BatchNorm has none."""
    network = lively(DRRN(**arguments, features=6)).eval()
    x = torch.rand(2, 1, 9, 9, dtype=torch.float64)
    network(x).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


def test_gradients_reach_every_weight_while_training_with_batchnorm() -> None:
    torch.manual_seed(0)
    network = DRRN(2, 3, features=8).train()
    network(torch.rand(4, 1, 9, 9)).square().sum().backward()
    without = [
        name
        for name, p in network.named_parameters()
        if p.grad is None or (not name.endswith("bias") and p.grad.abs().max() < 1e-6)
    ]
    assert without == []


def test_initialisation_is_he_normal_over_the_fan_in() -> None:
    torch.manual_seed(3)
    network = DRRN(2, 2, features=128)
    convs = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convs) == 7
    for name, conv in convs.items():
        expected = math.sqrt(2 / (9 * conv.in_channels))
        n = conv.weight.numel()
        within = 4 / math.sqrt(2 * n)  # four standard errors
        assert conv.weight.std().item() == pytest.approx(expected, rel=within), name
        assert abs(conv.weight.mean().item()) < 4 * expected / math.sqrt(n), name
        beyond = (conv.weight.abs() > 2 * expected).float().mean().item()
        assert beyond == pytest.approx(0.0455, abs=4 * math.sqrt(0.0455 / n)), f"{name} is not normal"
        assert torch.count_nonzero(conv.bias) == 0, name
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.count_nonzero(norm.bias) == 0
        assert norm.eps == 1e-5


# ---------------------------------------------------------------------- sizes and arguments


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 3), (5, 5), (31, 31), (17, 40)])
def test_any_size_comes_out_as_it_went_in(size: tuple[int, int], norm: str) -> None:
    network = lively(DRRN(1, 2, features=3, norm=norm)).eval()
    x = torch.rand(2, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        y = network(x)
        each = torch.cat([network(x[i : i + 1]) for i in range(2)])
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, each)
    state = network.state_dict()
    torch.testing.assert_close(y, equations(x, state, 1, 2))


@pytest.mark.parametrize("features", [1, 5, 16])
def test_any_number_of_features(features: int) -> None:
    network = DRRN(2, 1, features=features)
    assert network(torch.rand(1, 1, 6, 6)).shape == (1, 1, 6, 6)
    assert network.conv_weight_count == 9 * (features + 5 * features**2 + features)


def test_without_bias_there_is_none() -> None:
    assert all(m.bias is None for m in DRRN(2, 2, features=3, bias=False).modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (dict(B=0, U=1), "B = 0: must be at least 1"),
        (dict(B=-2, U=1), "B = -2"),
        (dict(B=1, U=-1), "U = -1"),
        (dict(B=1, U=1, features=0), "features = 0"),
        (dict(B=1, U=1, norm="layer"), "norm = 'layer'.*batch, none"),
    ],
    ids=ids,
)
def test_a_wrong_argument_is_refused_by_name(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DRRN(**wrong)


# ---------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("arguments", [dict(B=2, U=2), dict(B=1, U=2, norm="none"), dict(B=4, U=0)], ids=ids)
def test_in_bf16_the_first_convolution_sees_the_image_itself(arguments: dict) -> None:
    """Autocast would round it to steps of 1/256; what follows is bfloat16, identities included."""
    network = DRRN(**arguments, features=8).eval()
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0].dtype, o.dtype)}))
    blocks = [
        block.register_forward_hook(lambda m, i, o: seen.update(H=(o.dtype, o.dtype))) for block in network.blocks
    ]
    assert blocks
    with torch.autocast("cpu", torch.bfloat16):
        y = network(torch.rand(2, 1, 9, 9))
    assert seen.pop("blocks.0.conv") == (torch.float32, torch.float32)
    assert seen.pop("H") == (torch.bfloat16, torch.bfloat16)
    assert {output for _, output in seen.values()} == {torch.bfloat16}
    assert y.dtype == torch.float32


def test_bf16_costs_published_weights_nothing(drrn_data: Path) -> None:
    """The VDSR of huangzehao ×4 on a crop of butterfly: plain autocast costs 0.1 dB."""
    from drrn.images import read_luminance
    from drrn.networks import build
    from drrn.protocol import prepare, score
    from drrn.weights.foreign import read_foreign

    folder = os.environ.get("DRRN_WEIGHTS")
    if not folder:
        pytest.skip("set DRRN_WEIGHTS to the folder of vdsr_291_adam.caffemodel")
    foreign = read_foreign(Path(folder) / "vdsr_291_adam.caffemodel", "caffe")
    network = build(foreign.model).eval()
    network.load_state_dict(foreign.state)
    interpolated, truth = prepare(read_luminance(drrn_data / "Set5/butterfly.bmp")[40:168, 40:168], 4)
    x = torch.from_numpy(interpolated).float()[None, None]

    def quality(coarse: bool, image: Tensor) -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            y = network(image).float()
        return score(y[0, 0].numpy(), truth, 4)["psnr"]

    exact = quality(False, x)
    assert quality(True, x) == pytest.approx(exact, abs=0.005)
    assert quality(True, x.bfloat16().float()) < exact - 0.02  # what the first convolution would see
