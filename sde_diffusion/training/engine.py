"""The processes of a training run: this one alone, or those of accelerate.

`accelerate.Accelerator` fits `Engine` as it is, so one program runs as `python ...`,
`torchrun --nproc_per_node N ...` and `accelerate launch ...`.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sde_diffusion import validate

__all__ = ["Alone", "Engine", "accumulation", "launched", "precision"]


class Engine(Protocol):
    """Interface that training needs, with the names of `accelerate.Accelerator`.

    The bodies are those of a single process.
    """

    @property
    def num_processes(self) -> int:
        return 1

    @property
    def process_index(self) -> int:
        return 0

    @property
    def is_main_process(self) -> bool:
        return True

    @property
    def device(self) -> torch.device: ...

    def prepare(self, *parts: Any) -> Any:
        """Return network and optimizer, ready for several processes."""
        return parts

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Context in which gradients are accumulated and not exchanged."""
        return nullcontext()

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Any:
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, tensor: Any, reduction: str = "mean") -> Any:
        """The sum over the processes, on each of them, where reduction="sum"."""
        return tensor

    def wait_for_everyone(self) -> None:
        pass


class Alone(Engine):
    """A single process in plain torch.

    Args:
        device: device of the network.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._device


def launched(
    device: torch.device | str | None = None,
    *,
    compiled: bool = False,
    trackers: Sequence[str] = (),
    folder: Path | None = None,
    patience: timedelta = timedelta(minutes=10),
) -> Any:
    """Return the `accelerate.Accelerator` of all processes of this program.

    DDP where there are several; FSDP, on GPUs, by accelerate's configuration (fsdp_version: 2).
    accelerate's settings for mixed precision and accumulation are not used here: `precision` and
    `accumulation` read them, for a recipe.

    Args:
        device: device for training; accelerate's choice by default, a GPU if there is one.
        compiled: compile the network by torch.compile; accelerate's configuration may set it too.
        trackers: names of accelerate's trackers, "tensorboard" or "wandb".
        folder: output folder of the trackers.
        patience: longest time that a process waits for another one.
    Raises:
        ValueError: if accelerate is configured for a version of FSDP without plain state.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    on_cpu = device is not None and torch.device(device).type == "cpu"
    accelerator = Accelerator(
        # Without this, several processes on CPUs would each train alone, without an error.
        cpu=on_cpu or not torch.accelerator.is_available(),
        mixed_precision="no",
        dynamo_backend="inductor" if compiled else None,
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
    )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version must be 2 in accelerate's configuration; got 1")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        rule = f"the number of connected processes, {accelerator.num_processes}"
        raise ValueError(f"WORLD_SIZE must be {rule}; got {started}; launch them with torchrun")
    return accelerator


def precision() -> str:
    """The setting of `accelerate launch`: float32 or bf16."""
    setting = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return "float32" if setting == "no" else setting


def accumulation() -> int:
    """Parts of a process's batch: the setting of `accelerate launch`, or 1."""
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    setting = os.environ.get(name, "1")
    return validate.integer(name, int(setting) if setting.isdecimal() else setting)


def full(tensor: Any) -> Tensor:
    """The whole tensor of a shard, or the tensor itself; a call of all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like_ours(value: Tensor, ours: Any) -> Tensor:
    """Give `value` the device, the memory format and the shards of `ours`, and keep its dtype.

    A fused optimizer reads weights and moments in the order of memory: in different formats it
    would pair the wrong numbers without an error.
    """
    if not hasattr(ours, "full_tensor"):
        return torch.empty_like(ours, dtype=value.dtype, requires_grad=False).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(ours.device), ours.device_mesh, ours.placements)
