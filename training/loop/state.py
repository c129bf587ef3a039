"""The state of a run in memory, and how it is saved to checkpoints and loaded from them, sharded or not."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from ..learning.optimization import WeightAverage
from .checkpoints import (
    CheckpointError,
    NoCheckpointError,
    Progress,
    checkpoint_path,
    rotate_checkpoints,
    write_checkpoint,
    write_evaluation,
)
from .interruption import on_any_process


class TrainingState:
    """Model, optimizer, averaged weights and progress: all that a checkpoint holds.

    Args:
        accelerator: prepared `model` and `optimizer`.
        model: as prepared.
        optimizer: as prepared.
        average: of the weights, or None.
        progress: how far the run is.
        folder: of the checkpoints.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        progress: Progress,
        folder: Path,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.average = average
        self.progress = progress
        self.folder = folder
        self.is_sharded = accelerator.is_fsdp2
        self.failures: list[str] = []
        self.saved_step: int | None = None  # of the newest checkpoint

    @property
    def network(self) -> PreTrainedModel:
        """The model without what Accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    def weights(self, averaged: bool = False) -> dict[str, torch.Tensor]:
        """Weights on the CPU by the names of the unwrapped modules; whole on the main process."""
        if averaged:
            with self.average.in_model():
                return self.weights()
        if self.is_sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return get_model_state_dict(self.model, options=options)
        # Copies: the averages share the parameters' memory for as long as they are in the model.
        return {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Put whole weights into the model, every one of them."""
        if self.is_sharded:
            set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True))
        else:
            self.network.load_state_dict(weights, strict=True)

    def save(self, must_succeed: bool = False) -> None:
        """Write a checkpoint; a full disk is reported, and training continues.

        Args:
            must_succeed: whether the run ends here, so that a failure is an error.

        Raises: CheckpointError if it must succeed and cannot.
        """
        step = self.progress.step
        tensors = self.weights()
        averages = self.weights(averaged=True) if self.average is not None else None
        optimizer = {"optimizer": self._optimizer_state()}
        if self.accelerator.scaler is not None:
            optimizer["scaler"] = self.accelerator.scaler.state_dict()
        failure = ""
        if self.accelerator.is_main_process:
            try:
                write_checkpoint(self.folder, self.progress, tensors, optimizer, averages)
            except (OSError, MemoryError) as error:
                failure = f"{checkpoint_path(self.folder, step)} could not be written: {error or 'out of memory'}"
        if not on_any_process(self.accelerator, bool(failure)):
            self.saved_step = step
            return
        if must_succeed:
            raise CheckpointError(f"The checkpoint {failure or 'could not be written by the main process'}.")
        self._report(f"The checkpoint {failure}; older ones are untouched." if failure else "")

    def save_evaluation(self) -> None:
        """Add what an evaluation changed in the progress to the checkpoint of the same step."""
        if self.accelerator.is_main_process and self.saved_step == self.progress.step:
            try:
                write_evaluation(self.folder, self.progress)
            except OSError as error:
                self._report(f"The evaluation of step {self.progress.step} could not be saved: {error}.")

    def rotate(self, keep: int) -> None:
        """Delete all checkpoints but the newest `keep` ones and the best one."""
        if self.accelerator.is_main_process:
            rotate_checkpoints(self.folder, keep, [self.progress.best["step"]] if self.progress.best else [])
        self.accelerator.wait_for_everyone()

    def _report(self, failure: str) -> None:
        """Say that something could not be saved, now and at the end."""
        if failure:
            self.failures.append(failure)
            sys.stderr.write(f"{failure}\n")

    def load(self, path: Path, progress: Progress, tensors: dict[str, Any]) -> None:
        """Continue from a checkpoint; settings, learning rates and weight decay stay those of this run.

        Args:
            path: of the checkpoint, for messages.
            progress: as `read_checkpoint` returned it.
            tensors: as `read_checkpoint` returned them.

        Raises: NoCheckpointError if it does not fit.
        """
        progress.settings, progress.num_processes = self.progress.settings, self.progress.num_processes
        progress.data = self.progress.data
        self.progress, self.saved_step = progress, progress.step
        groups = [{key: x for key, x in group.items() if key != "params"} for group in self.optimizer.param_groups]
        try:
            if self.average is not None:
                # Its averages first, by way of the model, whose own weights follow.
                self.load_weights(tensors["ema"] or tensors["model"])
                self.average.exchange()
            self.load_weights(tensors["model"])
            self._load_optimizer_state(tensors["optimizer"]["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise NoCheckpointError(f"{path} does not fit this model and optimizer: {error}") from None
        for group, fresh in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(fresh)
        if self.accelerator.scaler is not None and "scaler" in tensors["optimizer"]:
            self.accelerator.scaler.load_state_dict(tensors["optimizer"]["scaler"])

    def _optimizer_state(self) -> dict[str, Any]:
        if self.is_sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
        else:
            state = self.optimizer.state_dict()
        # `initial_lr` is set again by the scheduler; a sharded optimizer that lacks it refuses to load it.
        groups = state.get("param_groups", [])  # a sharded state is only on the main process
        groups = [{key: x for key, x in group.items() if key != "initial_lr"} for group in groups]
        return {**state, "param_groups": groups}

    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        if self.is_sharded:
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=options)
        else:
            self.optimizer.load_state_dict(state)
