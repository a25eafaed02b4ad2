"""Checkpoints: folders that are whole or absent, from which a run continues bit for bit.

All processes of a run read the same folder, and the main process writes it.
"""

import copy
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch

from sde_diffusion import validate
from sde_diffusion.files import storage
from sde_diffusion.files.strict_json import plain
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.training.engine import full, like_ours
from sde_diffusion.training.optimizers import flat, kinds_of, load_state
from sde_diffusion.training.state import TrainState

__all__ = ["OtherSettings", "newest_checkpoint", "restore", "resume", "save", "saved"]

PREFIX = "checkpoint-"
PROGRESS = ("step", "skipped", "settings")  # of a state and of its record
ADDED = {"cond_dropout": 0.0}  # settings that older checkpoints do not have, and their values
STATE = validate.Kind("a TrainState", "settings", "averaged")


class OtherSettings(storage.BadFile):
    """A checkpoint of a run with other settings; the message lists the differences."""


@validate.arguments
def save(state: Annotated[TrainState, STATE], folder: str | Path, **record: object) -> Path:
    """Write a checkpoint under `folder`, whole or not at all; keep it and the one before.

    A checkpoint is a folder: denoiser.safetensors, the averaged denoiser that `Denoiser.load`
    reads, and training.safetensors, all that a resumed run needs. It is written under another name,
    flushed to the disk and renamed. A call of all processes.

    Args:
        record: facts for the JSON of the denoiser, such as the command that trained it.
    Raises:
        OSError: if the disk refuses; the checkpoints before it are untouched.
        ValueError: likewise, if a weight is not finite.
    """
    if "step" in record:
        raise ValueError("step must not be in the record of the caller; save adds it")
    folder = Path(folder)
    target = folder / f"{PREFIX}{state.step:08d}"
    averaged = state.averaged
    values = {**state.tensors, **flat(state.optimizer)}
    tensors = {name: full(value) for name, value in values.items() if torch.is_tensor(value)}
    progress = {name: getattr(state, name) for name in PROGRESS}
    progress["numbers"] = {name: value for name, value in values.items() if name not in tensors}
    if state.engine.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".{PREFIX}*.part"):
            shutil.rmtree(leftover)
        with TemporaryDirectory(".part", f".{PREFIX}", folder) as scratch:
            made = Path(scratch, "made")
            averaged.save(made / "denoiser.safetensors", step=state.step, **record)
            storage.write(made / "training.safetensors", tensors, progress)
            sync_folder(made)
            # What has to go is renamed, too: it is whole or absent at every instant.
            if target.exists():
                os.replace(target, Path(scratch, "replaced"))
            os.replace(made, target)
            sync_folder(folder)
            # Folders beyond this step are damaged, or of another run: they do not count.
            for old in [path for path in saved(folder) if step_of(path) <= state.step][:-2]:
                os.replace(old, Path(scratch, old.name))
    state.engine.wait_for_everyone()
    return target


@validate.arguments
def restore(state: Annotated[TrainState, STATE], checkpoint: str | Path) -> None:
    """Continue from a checkpoint of the same run; one that does not fit changes nothing.

    Raises:
        OtherSettings: if it was made with other settings.
        storage.BadFile: if it is damaged, or holds another network.
    """
    checkpoint = Path(checkpoint)
    path = checkpoint / "training.safetensors"
    tensors, record = storage.read(path)
    step, skipped, settings, numbers = progress_of(path, record)
    theirs, ours = {**ADDED, **settings}, plain(state.settings)
    pairs = {name: (theirs.get(name), ours.get(name)) for name in {**theirs, **ours}}
    changed = [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise OtherSettings(f"{path}: its run had other settings: {', '.join(changed)}")
    blank = copy.deepcopy(state.averaged)
    parts = {name: getattr(blank, name) for name in ("process", "parameterization", "noise_input")}
    Denoiser.load(checkpoint / "denoiser.safetensors", blank.network, **parts)
    values = {**tensors, **numbers}
    check_named(path, values, state, moved=step > skipped)
    with torch.no_grad():
        for name, ours in state.tensors.items():
            ours.copy_(like_ours(values.pop(name), ours))
    state.copy_buffers()
    load_state(state.optimizer, values)
    state.step, state.skipped = step, skipped


def progress_of(path: Path, record: dict[str, Any]) -> tuple[int, int, dict[str, Any], Any]:
    """Steps done, steps skipped, settings, numbers of the optimizer."""
    record = {"numbers": {}, **record}
    values: list[Any] = [record.get(name) for name in (*PROGRESS, "numbers")]
    step, skipped, settings, numbers = values
    if [*map(type, values)] != [int, int, dict, dict] or not 0 <= skipped <= step:
        raise storage.BadFile(f"{path.with_suffix('.json')}: not the record of a training run")
    return step, skipped, settings, numbers


def check_named(path: Path, values: dict[str, Any], state: TrainState, *, moved: bool) -> None:
    """Refuse values whose names, shapes or dtypes are not those of this state.

    A parameter that never had a gradient has no slots; any other has all of them.
    """
    found = kinds_of(values)
    touched = {parameter_of(name) for name in {*found, *state.first_slots}}
    slots = state.slots if moved else state.first_slots
    slots = {name: kind for name, kind in slots.items() if parameter_of(name) in touched}
    expected = kinds_of(state.tensors) | slots
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            kinds = f"{found.get(name, 'absent')}, not {expected.get(name, 'known here')}"
            raise storage.BadFile(f"{path}: of another network: {name} is {kinds}")


def parameter_of(slot: str) -> str:
    """The part `optimizer.<index>` of the name of a slot."""
    return ".".join(slot.split(".")[:2])


@validate.arguments
def resume(
    state: Annotated[TrainState, STATE], folder: str | Path
) -> tuple[Path | None, list[str]]:
    """Continue from the newest checkpoint under `folder` that can be read.

    Returns:
        its folder, or None, and the error message of each newer one.
    Raises:
        OtherSettings: if the newest readable one was made with other settings.
        storage.BadFile: if there are some and none can be read.
    """
    damaged: list[str] = []
    for checkpoint in reversed(saved(folder)):
        try:
            restore(state, checkpoint)
            return checkpoint, damaged
        except OtherSettings:
            raise
        except storage.BadFile as error:
            damaged.append(str(error))
    if damaged:
        raise storage.BadFile("; ".join(damaged))
    return None, []


def saved(folder: str | Path) -> list[Path]:
    """Whole checkpoints under `folder`, oldest first."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: not a folder")
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint; -1 for any other name."""
    digits = checkpoint.name.removeprefix(PREFIX)
    return int(digits) if re.fullmatch("[0-9]{8,18}", digits) else -1


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The last whole checkpoint under `folder`, or None."""
    return saved(folder)[-1] if saved(folder) else None


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
