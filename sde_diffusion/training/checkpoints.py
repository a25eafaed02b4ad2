"""Checkpoints: folders that are whole or absent, and a run that goes on from one as if unbroken.

Where there are several processes they read the same folder, and the main one writes it.
"""

import copy
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.files import storage
from sde_diffusion.files.strict_json import plain
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.training.engine import full, like_ours
from sde_diffusion.training.state import TrainState

__all__ = ["Otherwise", "checkpoints", "newest_checkpoint", "restore", "resume", "save"]

PREFIX = "checkpoint-"
ADDED = {"cond_dropout": 0.0}  # settings that older checkpoints do not have, as they were
SLOTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW, for each parameter


class Otherwise(storage.BadFile):
    """A checkpoint of a run with other settings; the message lists the differences."""


def save(state: TrainState, folder: str | Path, **record: object) -> Path:
    """Write a checkpoint under `folder`, whole or not at all; keep it and the one before.

    A checkpoint is a folder: denoiser.safetensors, the averaged denoiser that `Denoiser.load`
    reads, and training.safetensors, what it takes to go on. It is written under another name,
    flushed to the disk and renamed. A call of all processes.

    Args:
        record: facts for the JSON of the denoiser, such as the command that trained it.
    Raises:
        OSError: if the disk refuses; the checkpoints before it are untouched.
        ValueError: likewise, if a weight is not finite.
    """
    validate.kind("state", state, "a TrainState", "settings", "averaged")
    if "step" in record:
        raise ValueError("step: a name that the record keeps for itself")
    folder = Path(folder)
    target = folder / f"{PREFIX}{state.step:08d}"
    averaged = state.averaged
    tensors = {f"network.{name}": full(value) for name, value in weights(state).items()}
    for number, slots in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{slot}": full(value) for slot, value in slots.items()}
    told = {"step": state.step, "skipped": state.skipped, "settings": state.settings}
    if state.engine.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for end in ("part", "old"):
            for leftover in folder.glob(f".{PREFIX}*.{end}"):
                shutil.rmtree(leftover)
        scratch = folder / f".{target.name}.part"
        try:
            averaged.save(scratch / "denoiser.safetensors", step=state.step, **record)
            storage.write(scratch / "training.safetensors", tensors, told)
        except (OSError, ValueError):
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        sync_folder(scratch)
        if target.exists():
            discard(target)
        os.replace(scratch, target)
        sync_folder(folder)
        # Folders beyond this step are damaged, or of another run: they push nothing out.
        for old in [path for path in checkpoints(folder) if step_of(path) <= state.step][:-2]:
            discard(old)
    state.engine.wait_for_everyone()
    return target


def restore(state: TrainState, checkpoint: str | Path) -> None:
    """Go on from a checkpoint of the same run; one that does not fit changes nothing.

    Raises:
        Otherwise: if it was made with other settings.
        storage.BadFile: if it is damaged, or holds another network.
    """
    validate.kind("state", state, "a TrainState", "settings", "averaged")
    checkpoint = Path(checkpoint)
    path = checkpoint / "training.safetensors"
    tensors, record = storage.read(path)
    step, skipped, theirs = progress(path, record)
    theirs = {**ADDED, **theirs}
    ours = plain(state.settings)
    changed = [
        f"{name} {theirs.get(name)} -> {ours.get(name)}"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    ]
    if changed:
        raise Otherwise(f"{path}: the run was started otherwise: {', '.join(changed)}")
    averaged = Denoiser.load(
        checkpoint / "denoiser.safetensors",
        copy.deepcopy(state.averaged.network),
        process=state.denoiser.process,
        parameterization=state.denoiser.parameterization,
        noise_input=state.denoiser.noise_input,
    )
    check_tensors(path, tensors, state, moved=step > skipped)
    with torch.no_grad():
        for name, value in weights(state).items():
            value.copy_(like_ours(tensors[f"network.{name}"], value))
        for mean, value in zip(state.average, averaged.network.parameters(), strict=True):
            mean.copy_(like_ours(value, mean))
        for mean, value in zip(state.shadow.buffers(), averaged.network.buffers(), strict=True):
            mean.copy_(value)
    slots = {
        number: {slot: tensors[f"optimizer.{number}.{slot}"] for slot in SLOTS}
        for number in (range(len(state.weights)) if step > skipped else ())
    }
    for number, parameter in enumerate(state.weights):
        for slot in SLOTS[:2] if slots else ():
            slots[number][slot] = like_ours(slots[number][slot], parameter)
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": slots, "param_groups": groups})
    state.step, state.skipped = step, skipped


def progress(path: Path, record: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
    """Steps done, steps skipped, settings."""
    told: tuple[Any, ...] = tuple(record.get(name) for name in ("step", "skipped", "settings"))
    step, skipped, settings = told
    whole = type(step) is int and type(skipped) is int and isinstance(settings, dict)
    if not whole or not 0 <= skipped <= step:
        raise storage.BadFile(f"{path.with_suffix('.json')}: not the record of a training run")
    return step, skipped, settings


def check_tensors(
    path: Path, tensors: dict[str, Tensor], state: TrainState, *, moved: bool
) -> None:
    """Refuse tensors that are not, by name and shape, those of this state."""
    expected = {f"network.{name}": tuple(value.shape) for name, value in weights(state).items()}
    for number, parameter in enumerate(state.weights if moved else ()):
        shapes = (parameter.shape, parameter.shape, ())
        expected |= {
            f"optimizer.{number}.{slot}": tuple(shape)
            for slot, shape in zip(SLOTS, shapes, strict=True)
        }
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise storage.BadFile(
                f"{path}: of another network: {name} is {found.get(name, 'absent')}, "
                f"not {expected.get(name, 'known here')}"
            )


def weights(state: TrainState) -> dict[str, Any]:
    """Parameters and buffers of the network in training."""
    return state.network.state_dict()


def resume(state: TrainState, folder: str | Path) -> tuple[Path | None, list[str]]:
    """Go on from the newest checkpoint under `folder` that can be read.

    Returns:
        its folder, or None, and a line for each newer one that says what was wrong with it.
    Raises:
        Otherwise: if the newest readable one was made with other settings.
        storage.BadFile: if there are some and none can be read.
    """
    damaged: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        try:
            restore(state, checkpoint)
        except Otherwise:
            raise
        except storage.BadFile as error:
            damaged.append(str(error))
        else:
            return checkpoint, damaged
    if damaged:
        raise storage.BadFile("; ".join(damaged))
    return None, []


def checkpoints(folder: str | Path) -> list[Path]:
    """Whole checkpoints under `folder`, oldest first."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder")
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in its name; -1 where that is no checkpoint's."""
    digits = checkpoint.name.removeprefix(PREFIX)
    return int(digits) if re.fullmatch("[0-9]{8,18}", digits) else -1


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The last whole checkpoint under `folder`, or None."""
    return checkpoints(folder)[-1] if checkpoints(folder) else None


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint, of which no part is to be seen while it goes."""
    going = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(checkpoint, going)
    shutil.rmtree(going)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
