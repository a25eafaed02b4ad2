"""Checkpoints: folders that are whole or absent, from which a run continues bit for bit.

All processes of a run read the same folder, and the main process writes it.
"""

import copy
import os
import re
import shutil
from collections.abc import Collection, Mapping
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
PROGRESS = ("step", "skipped", "settings", "changes")  # of a state and of its record
ADDED = {"cond_dropout": 0.0}  # settings that older checkpoints do not have, and their values
# Slots of torch's optimizers that are never negative: counts, mean squares, step sizes.
NOT_NEGATIVE = {
    "step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "row_var", "col_var",
    "variance", "exp_inf", "step_size", "eta", "mu", "mu_product",
}  # fmt: skip
# Settings that the line of the optimizer repeats, and their names there.
REPEATED = {"learning_rate": "lr", "weight_decay": "weight_decay"}
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
    if state.changes:
        record = {"changes": state.changes, **record}
    values = {**state.tensors, **flat(state.optimizer)}
    tensors = {name: full(value) for name, value in values.items() if torch.is_tensor(value)}
    progress = {name: getattr(state, name) for name in PROGRESS}
    progress["numbers"] = {name: value for name, value in values.items() if name not in tensors}
    if state.engine.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".{PREFIX}*.part"):
            remove(leftover)
        with TemporaryDirectory(".part", f".{PREFIX}", folder) as scratch:
            made = Path(scratch, "made")
            averaged.save(made / "denoiser.safetensors", **record, step=state.step)
            progress["denoiser"] = storage.examine(made / "denoiser.safetensors").record["sha256"]
            storage.write(made / "training.safetensors", tensors, progress, state.buffers)
            storage.sync_folder(made)
            # What has to go is renamed, too: it is whole or absent at every instant.
            if os.path.lexists(target):
                os.replace(target, Path(scratch, "replaced"))
            os.replace(made, target)
            storage.sync_folder(folder)
            # Folders beyond this step are damaged, or of another run: they do not count.
            for old in [path for path in saved(folder) if step_of(path) <= state.step][:-2]:
                os.replace(old, Path(scratch, old.name))
    state.engine.wait_for_everyone()
    return target


@validate.arguments
def restore(
    state: Annotated[TrainState, STATE], checkpoint: str | Path, changed: Collection[str] = ()
) -> None:
    """Continue from a checkpoint of the same run; one that does not fit changes nothing.

    Args:
        changed: names of the settings that may differ from those of the run, such as {"steps"} to
            extend it or {"learning_rate"}. The schedule is that of the new settings from here on.
            The changes are in `state.changes` and in the records of later checkpoints.
    Raises:
        OtherSettings: if it was made with other settings.
        storage.BadFile: if it is damaged, or holds another network.
    """
    checkpoint = Path(checkpoint)
    path = checkpoint / "training.safetensors"
    tensors, record = storage.read(path, infinite=state.buffers)
    step, skipped, settings, changes, numbers = progress_of(path, record)
    new = differences(path, {**ADDED, **settings}, plain(state.settings), changed)
    if step > state.recipe.steps:
        raise OtherSettings(f"{path}: steps must be at least its {step}; got {state.recipe.steps}")
    check_halves(checkpoint, record)
    blank = copy.deepcopy(state.averaged)
    parts = {name: getattr(blank, name) for name in ("process", "parameterization", "noise_input")}
    Denoiser.load(checkpoint / "denoiser.safetensors", blank.network, **parts)
    values = {**tensors, **numbers}
    check_named(path, values, state, moved=step > skipped)
    with torch.no_grad():
        for name, ours in state.tensors.items():
            ours.copy_(like_ours(values.pop(name, ours), ours))
    state.copy_buffers()
    load_state(state.optimizer, values)
    state.step, state.skipped = step, skipped
    state.changes = [*changes, *([{"step": step, **new}] if new else [])]


def differences(
    path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], changed: Collection[str]
) -> dict[str, list[Any]]:
    """The settings that differ, as [old, new]; those not in `changed` are refused."""
    both = {**theirs, **ours}
    for name in changed:
        validate.choice("each entry of changed", name, both)
    found = {name: [theirs.get(name), ours.get(name)] for name in both}
    found = {name: [old, new] for name, (old, new) in found.items() if old != new}
    rest = [str(settings.get("optimizer")) for settings in (theirs, ours)]
    for short in (short for name, short in REPEATED.items() if name in {*changed, *found}):
        rest = [re.sub(rf"\b{short}=[^,; ]+,? ?", "", line) for line in rest]
    same = {"optimizer"} if rest[0] == rest[1] else set[str]()
    follows = {"warmup"} if "steps" in changed else set[str]()  # a tenth of them by default
    refused = [name for name in found if name not in {*changed, *same, *follows}]
    if refused:
        texts = (f"{name} {found[name][0]} -> {found[name][1]}" for name in refused)
        allowed = ", ".join(map(repr, sorted({*changed, *refused})))
        advice = f"if this is meant, give changed={{{allowed}}}"
        raise OtherSettings(f"{path}: its run had other settings: {', '.join(texts)}; {advice}")
    return found


def check_halves(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Refuse the files of two checkpoints in one folder, or of one in the folder of another."""
    path, step = checkpoint / "denoiser.safetensors", record["step"]
    other = storage.examine(path).record
    if record.get("denoiser", other["sha256"]) != other["sha256"] or other.get("step") != step:
        found = f"of step {other.get('step')}, not the one that training.json of step {step} names"
        raise storage.BadFile(f"{path}: {found}")
    if step_of(checkpoint) not in (-1, step):
        raise storage.BadFile(f"{checkpoint}: its files are of step {step}")


def progress_of(path: Path, record: dict[str, Any]) -> tuple[int, int, dict[str, Any], Any, Any]:
    """Steps done, steps skipped, settings, changes of settings, numbers of the optimizer."""
    record = {"numbers": {}, "changes": [], **record}
    values: list[Any] = [record.get(name) for name in (*PROGRESS, "numbers")]
    step, skipped, settings, changes, numbers = values
    kinds = [int, int, dict, list, dict]
    if [*map(type, values)] != kinds or not 0 <= skipped <= step:
        raise storage.BadFile(f"{path.with_suffix('.json')}: not the record of a training run")
    return step, skipped, settings, changes, numbers


def check_named(path: Path, values: dict[str, Any], state: TrainState, *, moved: bool) -> None:
    """Refuse values whose names, shapes or dtypes are not those of this state.

    A parameter that never had a gradient has no slots; any other has all of them. Older checkpoints
    do not hold buffers that are not persistent.
    """
    found = kinds_of(values)
    optional = state.buffers.keys() - state.denoiser.state_dict().keys() - found.keys()
    touched = {parameter_of(name) for name in {*found, *state.first_slots}}
    slots = state.slots if moved else state.first_slots
    slots = {name: kind for name, kind in slots.items() if parameter_of(name) in touched}
    expected = kinds_of(state.tensors) | slots
    expected = {name: kind for name, kind in expected.items() if name not in optional}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            kinds = f"{found.get(name, 'absent')}, not {expected.get(name, 'known here')}"
            raise storage.BadFile(f"{path}: of another network: {name} is {kinds}")
    for name in slots:
        counted = name.split(".", 2)[2] in NOT_NEGATIVE and values[name] is not None
        if counted and bool((torch.as_tensor(values[name]) < 0).any()):
            raise storage.BadFile(f"{path}: damaged: {name} is negative")


def parameter_of(slot: str) -> str:
    """The part `optimizer.<index>` of the name of a slot."""
    return ".".join(slot.split(".")[:2])


@validate.arguments
def resume(
    state: Annotated[TrainState, STATE], folder: str | Path, changed: Collection[str] = ()
) -> tuple[Path, list[str]]:
    """Continue from the newest checkpoint under `folder` that can be read.

    Args:
        changed: names of the settings that may differ from those of the run, see `restore`.
    Returns:
        its folder, and the error message of each newer one.
    Raises:
        FileNotFoundError: if there is none; `newest_checkpoint` finds this out before.
        OtherSettings: if the newest readable one was made with other settings.
        storage.BadFile: if none can be read.
    """
    damaged: list[str] = []
    for checkpoint in reversed(saved(folder)):
        try:
            restore(state, checkpoint, changed)
            return checkpoint, damaged
        except OtherSettings:
            raise
        except storage.BadFile as error:
            damaged.append(str(error))
    if damaged:
        raise storage.BadFile("; ".join(damaged))
    raise FileNotFoundError(f"{folder}: no checkpoint to resume from; is it the folder of a run?")


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


def remove(path: Path) -> None:
    """Delete a folder, a file, or a symbolic link but not what it leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
