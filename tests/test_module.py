"""`drrn.module`: the loss, the clipping, the rate and BatchNorm's averages against calculations by hand, through
Lightning's Trainer; evaluation against the protocol's functions called directly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from drrn.config import OptimConfig
from drrn.datamodule import SuperResolutionData
from drrn.errors import Diverged, UserError
from drrn.images import read_luminance, read_pixels
from drrn.losses import euclidean
from drrn.matlab import imresize, to_uint8
from drrn.metrics import ifc
from drrn.module import SuperResolution
from drrn.optimisers import learning_rate_factor
from drrn.patches import LOW, STEP, Patches
from drrn.protocol import Protocol, prepare, score, score_pixels
from drrn.runs.checkpoints import Checkpoints, newest_checkpoint
from drrn.runs.lightning import WholeSteps

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("You defined a `validation_step`", "Checkpoint directory", ".*LeafSpec")
]
Pair = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------- a Trainer around given batches


class Given(LightningDataModule):
    """The given batches in order, without evaluation data."""

    def __init__(self, batches: list[Pair]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    def evaluation_tasks(self, stage: str) -> list:
        return []


class Recorder(Logger):
    """Stores the logged metrics, one dict per step."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.append(dict(metrics))

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        pass


def optim(**changes: Any) -> dict[str, Any]:
    """conf/optim/paper.yaml with changes."""
    return {**OmegaConf.to_container(OmegaConf.load(ROOT / "conf/optim/paper.yaml")), **changes}


def module(
    B: int = 1,
    U: int = 2,
    norm: str = "none",
    steps_per_epoch: int = 1,
    max_steps: int = 100,
    seed: int = 0,
    **changes: Any,
) -> SuperResolution:
    torch.manual_seed(seed)
    model = dict(B=B, U=U, features=4, norm=norm, bias=True, weight_sharing=True, multi_path=True)
    return SuperResolution(model, optim(**changes), steps_per_epoch, max_steps)


def fit(trained: SuperResolution, batches: list[Pair], **arguments: Any) -> list[dict[str, float]]:
    """Train on the batches; return the logged metrics, one dict per step."""
    recorder = Recorder()
    arguments = {
        "enable_checkpointing": False, "max_steps": -1, "accelerator": "cpu", "log_every_n_steps": 1,
        "enable_progress_bar": False, **arguments,
    }  # fmt: skip
    trainer = Trainer(max_epochs=1, logger=recorder, enable_model_summary=False, num_sanity_val_steps=0, **arguments)
    trainer.fit(trained, datamodule=Given(batches))
    return [step for step in recorder.steps if "train/gamma" in step]


@pytest.fixture(scope="module")
def batches(tiny_patches: Path) -> list[Pair]:
    """Sixteen batches of eight real pairs."""
    x, y = Patches(tiny_patches)[np.arange(128)]
    x, y = (torch.from_numpy(z.astype(np.float32))[:, None] for z in (x * STEP + LOW, y / 255))
    return list(zip(x.split(8), y.split(8), strict=True))


# ---------------------------------------------------------------------- Eq. 10


def test_loss_is_equation_10(batches: list[Pair]) -> None:
    x, truth = batches[0]
    each = [
        0.5 * float(((t - p) ** 2).sum()) for p, t in zip(x.double().numpy(), truth.double().numpy(), strict=True)
    ]
    assert sum(each) > 1e-3
    assert euclidean(x, truth).item() == pytest.approx(sum(each) / len(each), rel=1e-6)


def test_loss_is_a_sum_over_pixels_and_a_mean_over_patches() -> None:
    truth = torch.zeros(3, 1, 31, 31)
    assert euclidean(truth + 0.5, truth).item() == pytest.approx(961 * 0.25 / 2, rel=1e-6)


def test_loss_is_in_float32_whatever_the_prediction(batches: list[Pair]) -> None:
    x, truth = batches[0]
    low = x.bfloat16()
    exact = 0.5 * ((low.double() - truth.double()) ** 2).sum().item() / len(x)
    loss = euclidean(low, truth)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=1e-5)


# ---------------------------------------------------------------------- steps against a calculation by hand


def by_hand(
    network: nn.Module, batches: list[Pair], settings: OptimConfig, micro: int, autocast: bool
) -> list[dict[str, float]]:
    """SGD on a network as release.md describes it; return the metrics to be logged, one dict per step."""
    momentum: dict[str, Tensor] = {}
    biases = {f"{n}.bias" for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    logged = []
    for step in range(len(batches) // micro):
        gamma = settings.lr * 0.5 ** (step // settings.halve_every_steps)
        network.zero_grad()
        losses = []
        for x, truth in batches[step * micro : (step + 1) * micro]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                prediction = network(x)
            loss = ((prediction.float() - truth) ** 2).sum() / (2 * len(x))
            (loss / micro).backward()
            losses.append(loss.item())
        gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
        bound = settings.theta / gamma
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        beyond = sum((g.abs() > bound).sum().item() for g in gradients.values())
        share = {
            "value": beyond / sum(g.numel() for g in gradients.values()),
            "norm": float(norm > bound),
            "none": 0.0,
        }
        logged.append(
            {
                "train/loss": sum(losses) / micro,  # the whole batch's, not the last micro-batch's
                "train/gamma": gamma,
                "train/gradient_norm": norm,
                "train/clipped": share[settings.clip],
            }
        )
        for name, p in network.named_parameters():
            g = gradients[name]
            if settings.clip == "value":
                g = g.clamp(-bound, bound)
            elif settings.clip == "norm":
                g = g * min(1.0, bound / norm)
            with torch.no_grad():
                g = g + settings.weight_decay * p
                momentum[name] = settings.momentum * momentum[name] + g if name in momentum else g
                rate = settings.bias_lr_mult if name in biases else 1.0
                rate = settings.last_lr_mult if name.startswith("conv_rec") and settings.last_lr_mult != 1 else rate
                p -= gamma * rate * momentum[name]
    return logged


@pytest.mark.parametrize("how", ["float32", "accumulated", "bf16-mixed"])
@pytest.mark.parametrize(
    ("clip", "lr", "theta"),
    [
        ("value", 0.1, 1e-3),
        ("value", 0.02, 1e-3),
        ("norm", 0.1, 2e-3),
        ("norm", 1e-4, 2e-3),
        ("none", 1e-4, 1),
        ("none", 1e-5, 1),
    ],
)
def test_steps_are_those_calculated_by_hand(
    clip: str, lr: float, theta: float, how: str, batches: list[Pair]
) -> None:
    """Six steps with the rate halved every two: clipped to θ/γ of the current γ, then decay, then momentum."""
    settings = dict(
        clip=clip, lr=lr, theta=theta, weight_decay=0.1, bias_lr_mult=0.1, residual_scale=0.1,
        halve_every_epochs=None, halve_every_steps=2, last_lr_mult=0.3 if clip == "none" else 1.0,
    )  # fmt: skip
    trained = module(**settings)
    start, expected = copy.deepcopy(trained.network), copy.deepcopy(trained.network)
    micro = 2 if how == "accumulated" else 1
    given = batches[: 6 * micro]
    logged = fit(
        trained, given, accumulate_grad_batches=micro, precision="bf16-mixed" if how == "bf16-mixed" else "32-true"
    )
    by_hands = by_hand(expected, given, OptimConfig(**optim(**settings)), micro, how == "bf16-mixed")

    tolerance = 1e-3 if how == "bf16-mixed" else 1e-4
    assert len(logged) == len(by_hands) == 6
    for got, wanted in zip(logged, by_hands, strict=True):
        assert {key: got[key] for key in wanted} == pytest.approx(wanted, rel=tolerance, abs=1e-9)
    clipped = [step["train/clipped"] for step in by_hands]
    if clip == "value":  # the bound cuts some gradients and not others
        assert all(0 < share < 1 for share in clipped)
    elif clip == "norm":
        assert clipped == [1] * 6 if lr == 0.1 else {0, 1} == set(clipped)
    after, wanted, before = (
        nn.utils.parameters_to_vector(n.parameters()) for n in (trained.network, expected, start)
    )
    moved = (wanted - before).abs().max().item()
    assert moved > 1e-5
    torch.testing.assert_close(after, wanted, rtol=0, atol=10 * tolerance * moved)


def test_value_clipping_bounds_each_gradient_by_theta_over_the_current_rate(batches: list[Pair]) -> None:
    """Without momentum and decay a step moves no weight by more than θ, whatever γ is; many move by θ itself."""
    for lr in (0.1, 0.001):
        theta = 0.01
        trained = module(clip="value", lr=lr, theta=theta, momentum=0.0, weight_decay=0.0)
        before = copy.deepcopy(trained.network.state_dict())
        scaled = [(x * 30, truth) for x, truth in batches[:1]]  # gradients far beyond both bounds
        (logged,) = fit(trained, scaled)
        steps = torch.cat([(before[k] - v).flatten().abs() for k, v in trained.network.state_dict().items()])
        assert steps.max().item() == pytest.approx(theta, rel=1e-3)
        assert (steps > theta * 0.999).float().mean().item() == pytest.approx(logged["train/clipped"], abs=0.02)
        assert logged["train/clipped"] > 0.3


def test_norm_clipping_makes_a_step_of_length_theta(batches: list[Pair]) -> None:
    for lr in (0.1, 0.001):
        trained = module(clip="norm", lr=lr, theta=0.01, momentum=0.0, weight_decay=0.0)
        before = copy.deepcopy(trained.network.state_dict())
        (logged,) = fit(trained, [(x * 30, truth) for x, truth in batches[:1]])
        squares = sum((before[k] - v).double().square().sum().item() for k, v in trained.network.state_dict().items())
        assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-3)
        assert logged["train/clipped"] == 1


def test_a_gradient_within_the_bound_is_left_alone(batches: list[Pair]) -> None:
    weights = []
    for clip in ("value", "norm", "none"):
        trained = module(clip=clip, lr=1e-4, theta=1e6)
        logged = fit(trained, batches[:3])
        assert [step["train/clipped"] for step in logged] == [0, 0, 0]
        weights.append(nn.utils.parameters_to_vector(trained.network.parameters()))
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[2])


def test_accumulation_is_the_step_of_the_large_batch(batches: list[Pair]) -> None:
    """Exact without BatchNorm; with it, every micro-batch has statistics of its own."""
    large = [tuple(torch.cat(z) for z in zip(*batches[k : k + 4], strict=True)) for k in range(0, 16, 4)]
    weights, losses = [], []
    for given, micro in ((large, 1), (batches, 4)):
        trained = module(clip="value", lr=0.01, theta=0.005, residual_scale=0.1)
        logged = fit(trained, given, accumulate_grad_batches=micro)
        assert len(logged) == 4
        losses.append([step["train/loss"] for step in logged])
        weights.append(nn.utils.parameters_to_vector(trained.network.parameters()))
    start = nn.utils.parameters_to_vector(module(residual_scale=0.1).network.parameters())
    assert (weights[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ---------------------------------------------------------------------- the rate


@pytest.mark.parametrize(
    ("settings", "steps_per_epoch", "every"),
    [
        (dict(halve_every_epochs=None, halve_every_steps=3), 100, 3),
        (dict(halve_every_epochs=2), 2, 4),
        (dict(halve_every_epochs=0.5), 5, 2),
    ],
)
def test_the_rate_is_halved_at_the_right_steps(
    settings: dict, steps_per_epoch: int, every: int, batches: list[Pair]
) -> None:
    trained = module(U=0, clip="value", lr=1e-3, theta=1e-6, steps_per_epoch=steps_per_epoch, **settings)
    gammas = [step["train/gamma"] for step in fit(trained, batches[:9])]
    assert gammas == pytest.approx([1e-3 * 0.5 ** (step // every) for step in range(9)])


@pytest.mark.parametrize("micro", [1, 2])
def test_the_rate_counts_optimiser_steps_and_biases_have_their_share_of_it(micro: int, batches: list[Pair]) -> None:
    trained = module(
        U=1, norm="batch", lr=0.01, theta=1e-6, bias_lr_mult=0.1, halve_every_epochs=None, halve_every_steps=2
    )
    logged = fit(trained, batches[: 5 * micro], accumulate_grad_batches=micro)
    assert [step["train/gamma"] for step in logged] == pytest.approx([0.01, 0.01, 0.005, 0.005, 0.0025])
    optimizer = trained.trainer.optimizers[0]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(trained.network.parameters()))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}  # on everything
    slow = {id(m.bias) for m in trained.network.modules() if isinstance(m, nn.Conv2d)}
    for key, rate in rates.items():
        assert rate == pytest.approx(0.00025 if key in slow else 0.0025)


def test_the_papers_rate_over_its_whole_run() -> None:
    """0.1 halved every 10 epochs, counted in steps."""
    paper = OptimConfig(**optim())
    for epoch, factor in ((0, 1), (9.99, 1), (10, 0.5), (19.99, 0.5), (20, 0.25), (70.5, 0.5**7)):
        assert learning_rate_factor(paper, int(epoch * 6536), 6536, 464_056) == factor


def test_cosine_goes_from_one_to_zero() -> None:
    cosine = OptimConfig(**optim(schedule="cosine", halve_every_epochs=None))
    factors = [learning_rate_factor(cosine, step, 1, 100) for step in range(101)]
    assert factors == pytest.approx([(1 + math.cos(math.pi * k / 100)) / 2 for k in range(101)])
    assert factors[0] == 1
    assert factors[100] == pytest.approx(0, abs=1e-12)
    assert learning_rate_factor(cosine, 150, 1, 100) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("algorithm", ["sgd", "adam"])
def test_what_the_optimiser_remembers_takes_the_layout_of_the_weights(algorithm: str) -> None:
    """Fused kernels traverse both in memory order; a checkpoint may have the other layout."""

    def stepped(layout: torch.memory_format, before: tuple[dict, dict] | None) -> tuple[dict, dict]:
        trained = module(U=2, algorithm=algorithm, bias_lr_mult=1.0)
        trained.network.to(memory_format=layout)
        optimizer = trained.configure_optimizers()["optimizer"]
        if before is not None:
            trained.network.load_state_dict(before[0])
            optimizer.load_state_dict(copy.deepcopy(before[1]))
        WholeSteps().on_train_start(SimpleNamespace(optimizers=[optimizer]), trained)
        generator = torch.Generator().manual_seed(1)
        for parameter in trained.network.parameters():
            gradient = torch.rand(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()
        return trained.network.state_dict(), optimizer.state_dict()

    begun = stepped(torch.channels_last, None)
    (same, _), (other, _) = (stepped(layout, begun) for layout in (torch.channels_last, torch.contiguous_format))
    for name in same:
        torch.testing.assert_close(other[name], same[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("algorithm", ["sgd", "adam"])
def test_the_optimiser_is_fused_unless_it_would_undo_a_loss_scale_after_the_clipping(algorithm: str) -> None:
    changes = {"algorithm": algorithm, "bias_lr_mult": 1.0}
    assert module(**changes).configure_optimizers()["optimizer"].param_groups[0]["fused"] is True
    scaled = module(**changes)
    scaled._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    assert scaled.configure_optimizers()["optimizer"].param_groups[0]["fused"] is False


def test_adam_takes_the_step_that_adam_takes(batches: list[Pair]) -> None:
    """First step of Adam: γ · sign(g), for gradients that are not tiny."""
    trained = module(
        algorithm="adam", lr=1e-3, clip="none", weight_decay=0.0, schedule="cosine", halve_every_epochs=None
    )
    before = copy.deepcopy(trained.network)
    x, truth = batches[0]
    (((before(x) - truth) ** 2).sum() / (2 * len(x))).backward()
    fit(trained, batches[:1])
    for old, new in zip(before.parameters(), trained.network.parameters(), strict=True):
        large = old.grad.abs() > 1e-3
        torch.testing.assert_close((new - old)[large], -1e-3 * old.grad.sign()[large], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_residual_scale_is_where_training_starts(scale: float, batches: list[Pair]) -> None:
    """0 starts at bicubic itself, 1 at He's initialisation."""
    trained = module(norm="batch", residual_scale=scale).eval()
    x, _ = batches[0]
    with torch.no_grad():
        assert torch.equal(trained(x), x) is (scale == 0)
    torch.manual_seed(0)
    assert torch.equal(trained.network.conv_rec.weight, scale * module(norm="batch").network.conv_rec.weight)


# ---------------------------------------------------------------------- BatchNorm's averages


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("decay", [0.999, 0.9, 0.0])
def test_batchnorm_averages_as_caffe_does(decay: float, micro: int, batches: list[Pair]) -> None:
    """Σ λᵏ · statistic / Σ λᵏ over the batches seen. The first BatchNorm sees the input, whatever the weights."""
    trained = module(norm="batch", lr=0.01, theta=1e-4, bn_average=decay)
    first = trained.network.blocks[0].norm
    for seen in (1, 2, 8):
        again = copy.deepcopy(trained)
        fit(again, batches[: seen * micro], accumulate_grad_batches=micro)
        first = again.network.blocks[0].norm
        x = [b.double() for b, _ in batches[: seen * micro]]
        n = len(x)
        weights = [decay ** (n - 1 - k) for k in range(n)]
        for statistic, stored in ((torch.mean, first.running_mean), (torch.var, first.running_var)):
            average = sum(w * statistic(b).item() for w, b in zip(weights, x, strict=True)) / sum(weights)
            assert stored.item() == pytest.approx(average, rel=1e-4)


def test_every_batchnorm_is_averaged_so(batches: list[Pair]) -> None:
    """One batch: each BatchNorm's averages are that batch's own statistics, so both modes give one output."""
    trained = module(B=2, U=2, norm="batch", lr=1e-12, theta=1e-12)
    fit(trained, batches[:1])
    x, _ = batches[0]
    seen = {}
    for name, layer in trained.network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda m, i, o, name=name: seen.update({name: i[0].detach()}))
    state = copy.deepcopy(trained.network.state_dict())
    trained.network.train()(x)
    assert len(seen) == 2 * (1 + 4) + 1
    for name, given in seen.items():
        torch.testing.assert_close(state[f"{name}.running_mean"], given.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(state[f"{name}.running_var"], given.var((0, 2, 3)), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- divergence


@pytest.mark.parametrize("what", ["nan", "infinite"])
@pytest.mark.parametrize("clip", ["value", "norm", "none"])
def test_a_loss_that_is_no_number_stops_the_run(clip: str, what: str, batches: list[Pair], tmp_path: Path) -> None:
    trained = module(clip=clip, lr=1e-3, theta=1e-4)
    x, truth = batches[2]
    bad = (x, truth * math.nan) if what == "nan" else (x * 1e25, truth)
    with pytest.raises(Diverged) as stopped:
        fit(
            trained,
            [*batches[:2], bad, batches[3]],
            enable_checkpointing=True,
            callbacks=[Checkpoints(tmp_path, 1)],
        )
    assert isinstance(stopped.value, UserError)
    text = str(stopped.value)
    for said in ("step 2", "γ = 0.001", what[:3], f"clip = {clip}", "θ = 0.0001", "optim.lr"):
        assert said in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step00000001.ckpt", "step00000002.ckpt"]
    last = torch.load(newest_checkpoint(tmp_path), weights_only=True)
    assert last["global_step"] == 2
    for name, tensor in trained.network.named_parameters():
        assert torch.equal(tensor, last["state_dict"][f"network.{name}"]), name
        assert torch.isfinite(tensor).all()


def test_a_nan_in_a_micro_batch_that_is_not_the_last_stops_the_run_too(batches: list[Pair]) -> None:
    trained = module(lr=1e-3)
    start = nn.utils.parameters_to_vector(trained.network.parameters()).clone()
    x, truth = batches[0]
    with pytest.raises(Diverged, match="step 0"):
        fit(trained, [(x, truth * math.nan), batches[1]], accumulate_grad_batches=2)
    assert torch.equal(nn.utils.parameters_to_vector(trained.network.parameters()), start)


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_loads_without_running_code(batches: list[Pair], tmp_path: Path) -> None:
    trained = module(norm="batch", lr=1e-3, theta=1e-3, bias_lr_mult=0.1)
    fit(trained, batches[:2], enable_checkpointing=True, callbacks=[Checkpoints(tmp_path, 2)])
    path = newest_checkpoint(tmp_path)
    kept = torch.load(path, weights_only=True)
    assert kept["hyper_parameters"]["optim"] == optim(lr=1e-3, theta=1e-3, bias_lr_mult=0.1)
    assert kept["hyper_parameters"]["model"]["U"] == 2
    again = SuperResolution.load_from_checkpoint(path, weights_only=True)
    assert again.hparams == trained.hparams
    for name, tensor in trained.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name


def test_the_newest_two_checkpoints_are_kept(batches: list[Pair], tmp_path: Path) -> None:
    fit(module(U=0, theta=1e-4), batches[:7], enable_checkpointing=True, callbacks=[Checkpoints(tmp_path, 2)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step00000006.ckpt", "step00000007.ckpt"]


def test_a_newest_checkpoint_that_cannot_be_read_is_passed_over(
    batches: list[Pair], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    fit(module(U=0, theta=1e-4), batches[:2], enable_checkpointing=True, callbacks=[Checkpoints(tmp_path, 1)])
    first, second = tmp_path / "step00000001.ckpt", tmp_path / "step00000002.ckpt"
    assert newest_checkpoint(tmp_path) == second
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    assert newest_checkpoint(tmp_path) == first
    assert str(second) in caplog.text
    first.write_bytes(b"")
    assert newest_checkpoint(tmp_path) is None


def test_training_again_beside_old_checkpoints_replaces_them(batches: list[Pair], tmp_path: Path) -> None:
    """A failed run that is started from scratch must not leave an old state under a checkpoint's name."""
    for seed in (0, 1):
        trained = module(U=0, theta=1e-4, seed=seed)
        fit(trained, batches[:2], enable_checkpointing=True, callbacks=[Checkpoints(tmp_path, 1)])
    kept = torch.load(newest_checkpoint(tmp_path), weights_only=True)["state_dict"]
    for name, tensor in trained.network.state_dict().items():
        assert torch.equal(kept[f"network.{name}"], tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step00000001.ckpt", "step00000002.ckpt"]


# ---------------------------------------------------------------------- evaluation


def eight_bit(image: NDArray[np.float64], border: int) -> NDArray[np.uint8]:
    levels = np.floor(np.clip(image.astype(np.float32) * np.float32(255), 0, 255).astype(np.float64) + 0.5)
    return levels[border:-border, border:-border].astype(np.uint8)


@pytest.fixture(scope="module")
def evaluated(
    configure: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SuperResolution, dict, dict, list]:
    """A network with random weights, measured by `test` (×2, ×3) and by `validate` (×3)."""
    config = configure("data.scales=[2,3]", "data.val_scales=[3]", "model.features=4")
    torch.manual_seed(5)
    scored = SuperResolution(config.model, asdict(config.optim))
    with torch.no_grad():
        scored.network.conv_rec.weight.mul_(0.1)
    arguments = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                     default_root_dir=tmp_path_factory.mktemp("root"))  # fmt: skip
    (validated,) = Trainer(**arguments).validate(scored, datamodule=SuperResolutionData(config), verbose=False)
    validation = scored.scores
    two, three = Trainer(**arguments).test(scored, datamodule=SuperResolutionData(config), verbose=False)
    tested = two | three
    assert [(row["scale"], row["image"]) for row in validation] == [(3, "camera.png"), (3, "chelsea.png")]
    return scored.eval(), tested, validated, validation


def test_scores_are_those_of_the_protocol(evaluated: tuple, tiny_images: Path) -> None:
    scored, _, _, validation = evaluated
    rows = scored.scores
    assert [(row["scale"], row["image"]) for row in rows] == [
        (s, name) for s in (2, 3) for name in ("camera.png", "chelsea.png")
    ]
    for row in rows:
        assert row["set"] == tiny_images.name
        x, truth = prepare(read_luminance(tiny_images / row["image"]), row["scale"])
        with torch.no_grad():
            y = scored(torch.from_numpy(x).float()[None, None])[0, 0].numpy()
        direct = score(y, truth, row["scale"])
        assert (row["psnr"], row["ssim"]) == pytest.approx((direct["psnr"], direct["ssim"]), rel=1e-6)
        mine = eight_bit(y, row["scale"]), eight_bit(truth, row["scale"])
        assert row["psnr"] == pytest.approx(skimage.metrics.peak_signal_noise_ratio(*mine), rel=1e-6)
    assert [(row["psnr"], row["ssim"]) for row in validation] == [(row["psnr"], row["ssim"]) for row in rows[2:]]


def test_the_bicubic_columns_are_bicubic(evaluated: tuple, tiny_images: Path) -> None:
    for row in evaluated[0].scores:
        s = row["scale"]
        y = read_luminance(tiny_images / row["image"])
        truth = y[: y.shape[0] // s * s, : y.shape[1] // s * s] / 255
        bicubic = eight_bit(imresize(imresize(truth, 1 / s), s), s)
        expected = skimage.metrics.peak_signal_noise_ratio(bicubic, eight_bit(truth, s))
        assert row["bicubic_psnr"] == pytest.approx(expected, rel=1e-6)
        np.testing.assert_array_equal(bicubic, to_uint8(imresize(imresize(truth, 1 / s), s))[s:-s, s:-s])
        assert row["bicubic_psnr"] != row["psnr"]
        assert 0 < row["bicubic_ssim"] < 1


def test_validations_may_compute_in_bfloat16_and_the_test_does_not(
    evaluated: tuple, configure: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`speed.validation=auto` with bfloat16 reported as available: scores are equal to 0.01 dB, not exactly."""
    monkeypatch.setattr("drrn.fast.precision._has_bf16", lambda device: True)
    scored, _, _, expected = evaluated
    before = scored.scores
    config = configure("data.scales=[3]", "data.val_scales=[3]", "speed.validation=auto")
    scored.validated_in = config.speed.validation
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                      default_root_dir=tmp_path)  # fmt: skip
    try:
        found = {}
        for stage in (trainer.validate, trainer.test):
            stage(scored, datamodule=SuperResolutionData(config), verbose=False)
            found[stage.__name__] = [row["psnr"] for row in scored.scores]
    finally:
        scored.validated_in, scored.scores = "float32", before
    exact = [row["psnr"] for row in expected]
    assert found["test"] == exact
    assert found["validate"] != exact
    assert found["validate"] == pytest.approx(exact, abs=0.01)


def test_a_sets_score_is_the_plain_mean_of_its_images(evaluated: tuple) -> None:
    scored, tested, validated, _ = evaluated
    for scale in (2, 3):
        rows = [row for row in scored.scores if row["scale"] == scale]
        for metric in ("psnr", "ssim"):
            mean = sum(row[metric] for row in rows) / 2
            assert tested[f"test/tiny_x{scale}/{metric}"] == pytest.approx(mean, rel=1e-5)
            if scale == 3:
                assert validated[f"validate/tiny_x3/{metric}"] == pytest.approx(mean, rel=1e-5)
    assert set(validated) == {"validate/tiny_x3/psnr", "validate/tiny_x3/ssim"}


def test_the_end_scores_other_sets_by_other_metrics(configure: Callable, tmp_path: Path, inline_pool: None) -> None:
    """`data.test` and `data.test_metrics`: IFC of a noisy photograph that is in no validation set."""
    (tmp_path / "cat").mkdir()
    Image.fromarray(skimage.data.chelsea()[60:150, 100:190]).save(tmp_path / "cat/eye.png")
    config = configure(f"data.test=[{tmp_path}/cat]", "data.test_metrics=[ifc,psnr_rgb]", "data.scales=[3]",
                       "data.degradation=DN")  # fmt: skip
    scored = SuperResolution(config.model, asdict(config.optim))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (logged,) = trainer.test(scored, datamodule=SuperResolutionData(config), verbose=False)
    (row,) = scored.scores
    pixels = read_pixels(tmp_path / "cat/eye.png")
    x, truth = prepare(pixels, 3, degradation="DN")
    assert row["bicubic_ifc"] == pytest.approx(ifc(eight_bit(truth, 3), eight_bit(x, 3)), rel=1e-6)
    direct = score_pixels(x, pixels, 3, ("psnr_rgb",), Protocol(degradation="DN"))
    assert row["bicubic_psnr_rgb"] == pytest.approx(direct["psnr_rgb"], abs=1e-4)
    assert logged["test/cat_x3/ifc"] == pytest.approx(row["ifc"], rel=1e-5)
    assert {"psnr", "ssim", "bicubic_psnr", "bicubic_ssim"} < row.keys()
