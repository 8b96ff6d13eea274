"""User-defined callbacks: `+callbacks.NAME={_target_: …}`, or a group of conf/callbacks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, Timer

from drrn.config import Config
from drrn.datamodule import SuperResolutionData
from drrn.errors import UserError
from drrn.help import closest
from drrn.targets import make, resolve

# Classes of Lightning that would break a promise of a run → the alternative, or the reason.
REFUSED = {
    "GradientAccumulationScheduler": "use trainer.accumulate_grad_batches: data.batch_size is the whole batch",
    "BatchSizeFinder": "data.batch_size is part of a run's identity",
    "LearningRateFinder": "optim.lr is part of a run's identity",
    "StochasticWeightAveraging": "it averages over epochs, and a run is one epoch to Lightning; use callbacks=ema",
    "BaseFinetuning": "it counts epochs, and a run is one epoch to Lightning",
    "ModelPruning": "weights.safetensors would not be the network that model.* describes",
    "ProgressBar": "a run has its own",
}


def make_callbacks(config: Config, folder: Path) -> list[Callback]:
    """Instantiate the callbacks of `config.callbacks`; one that would break a promise of a run is a UserError.

    A ModelCheckpoint without a `dirpath` writes to `folder`/NAME.
    """
    made: list[Callback] = []
    for name, node in config.callbacks.items():
        key = f"callbacks.{name}"
        kind, _ = resolve(key, node, Callback)
        for base in kind.__mro__:
            if base.__name__ in REFUSED and base.__module__.startswith("lightning."):
                raise UserError(f"{key}: {kind.__name__} cannot be used here: {REFUSED[base.__name__]}")
        if kind is EMAWeightAveraging and "device" not in node:
            node = {**node, "_target_": "drrn.runs.lightning.AverageOnDevice"}
        saves = issubclass(kind, ModelCheckpoint)
        callback = make(key, node, Callback, **({"dirpath": str(folder / name)} if saves else {}))
        if saves and Path(callback.dirpath).resolve() == (folder / "checkpoints").resolve():
            raise UserError(f"{key}.dirpath = {callback.dirpath}: the run keeps its own checkpoints there")
        if isinstance(callback, Timer) and config.trainer.max_time is not None:
            raise UserError(f"{key} and trainer.max_time: Lightning takes one timer; give one")
        made.append(callback)
    if len({callback.state_key for callback in made}) < len(made):
        raise UserError(
            "callbacks: two have the same class and arguments: a resumed run cannot tell their states apart"
        )
    return made


def refuse_unknown_monitors(names: Iterable[str], made: Sequence[Callback], data: SuperResolutionData) -> None:
    """Refuse a callback whose `monitor` no run logs, before the first step; Lightning would at the first validation.

    Nothing is refused if a callback of another package is among them: it may log further metrics. `names` are the
    configuration's names of `made`.
    """
    if not all(type(callback).__module__.startswith(("lightning.", "drrn.")) for callback in made):
        return
    places = ["validate", *(f"validate/{task}" for task in data.evaluation_tasks("validate"))]
    known = [f"{place}/{metric}" for metric in data.evaluation_metrics("validate") for place in places]
    for name, callback in zip(names, made, strict=True):
        watched = getattr(callback, "monitor", None)
        if isinstance(watched, str) and watched not in known and not watched.startswith("train/"):
            raise UserError(
                f"callbacks.{name}.monitor = {watched!r}: no run logs it{closest(watched, known)}; there are "
                f"{', '.join(known)}, train/loss"
            )
