"""Lightning's data module: shuffled training patches, and the evaluation sets image by image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from drrn.config import Config, DataConfig
from drrn.crops import Crops, Draws, prepare_images
from drrn.metrics import in_training
from drrn.networks import input_of
from drrn.pairs import Pairs, low_pairs, pair_loader, turned
from drrn.patch_build import prepare_patches
from drrn.patches import LOW, STEP, Patches, Recipe, ShuffledBatches, whole_batches
from drrn.sets import evaluation_sets


class Task(NamedTuple):
    """One cell of a results table: a set, by its label, at a scale."""

    set_name: str
    scale: int

    def __str__(self) -> str:
        return f"{self.set_name}_x{self.scale}"


def prepare_pairs(data: DataConfig, input: str = "interpolated") -> Patches | Crops:
    """The training pairs, from the patch file or as crops; the file is built if it does not exist."""
    if data.crops:
        return Crops(prepare_images(data), data, input)
    path = prepare_patches(data.name, Recipe.of(data), Path(data.root), Path(data.patches), max(1, data.num_workers))
    return Patches(path, turns=8 if data.augment == "online" else 1)


class SuperResolutionData(LightningDataModule):
    """Training patches and evaluation sets of a run.

    To Lightning the whole run is one epoch: `ShuffledBatches` counts the data's own epochs, so that a run can
    stop and be resumed at any step. `prepare_data` may be called in every process: only one builds, the others wait.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.data, self.seed, self.micro = config.data, config.seed, config.trainer.accumulate_grad_batches
        self.input = input_of(config.model)
        self.max_steps, self.max_epochs = config.trainer.max_steps, config.trainer.max_epochs

    def prepare_data(self) -> None:
        """Download missing images, build the file of the pairs if it does not exist, and compute the run's length."""
        if hasattr(self, "pairs"):  # Lightning calls this again for each fit and test
            return
        self.sets = evaluation_sets(self.data)
        self.pairs = prepare_pairs(self.data, self.input)
        self.steps_per_epoch = whole_batches(len(self.pairs), self.data.batch_size)
        if self.max_epochs is not None:  # epochs of the data
            self.max_steps = max(1, round(self.max_epochs * self.steps_per_epoch))

    def state_dict(self) -> dict[str, Any]:
        """{}; but Lightning calls this for every checkpoint, so a changed file of pairs is a UserError here."""
        self.pairs.check_unchanged()
        return {}

    def evaluation_tasks(self, stage: str) -> list[Task]:
        """Sets × scales: `data.val` × `val_scales` for "validate", `data.test` × `scales` for "test"."""
        scales = self.data.scales if stage == "test" else self.data.val_scales
        return [Task(label, scale) for label in self.sets[stage] for scale in scales]

    def evaluation_metrics(self, stage: str) -> tuple[str, ...]:
        """Names of the metrics; for "test" also `data.test_metrics`."""
        more = (self.data.test_metrics or ()) if stage == "test" else ()
        return tuple(dict.fromkeys([*in_training(), *more]))

    def train_dataloader(self) -> DataLoader:
        """Batches of stored integers, which the hooks below convert to floats on the device."""
        trainer = self.trainer
        order = Draws if self.data.crops else ShuffledBatches
        batches = order(
            len(self.pairs),
            self.data.batch_size,
            self.seed,
            steps=self.max_steps,
            start=trainer.global_step,
            micro=self.micro,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        gpu = torch.cuda.is_available() and trainer.strategy.root_device.type == "cuda"
        return pair_loader(self.pairs, batches, self.data.num_workers, pin_memory=gpu)

    def val_dataloader(self) -> list[DataLoader]:
        """The image files of each of `evaluation_tasks`, divided between the ranks without padding.

        A rank without a file gets None, so that it takes part in the collectives of the evaluation.
        """
        stage = "test" if self.trainer.testing else "validate"
        first, step = self.trainer.global_rank, self.trainer.world_size
        shares = (self.sets[stage][task.set_name][first::step] for task in self.evaluation_tasks(stage))
        return [DataLoader(share or [None], batch_size=None, shuffle=False) for share in shares]

    test_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert arrays to tensors; pinned batches are tensors already."""
        return tuple(torch.from_numpy(part) for part in batch) if isinstance(batch, Pairs) else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Stored integers → (x, x̃) [N, 1, p, p], float32 in 0…1 (x may overshoot), rotated; on the device.

        For a network with the input "low", x is made of x̃ (`low_pairs`).
        """
        if not self.trainer.training:
            return batch
        data, label, *orientation = batch
        pair = data.float().mul_(STEP).add_(LOW), label.float().div_(255)
        pair = tuple(turned(z, *orientation) if orientation else z for z in pair)
        if self.input == "low" and not self.data.crops:
            pair = low_pairs(pair[1], self.data.scales[0])
        return tuple(z[:, None] for z in pair)
