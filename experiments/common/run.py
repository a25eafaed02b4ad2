"""Shared by the scripts that train: a run is a folder, and survives interruption.

python experiments/mnist_vp.py --train ...
torchrun --nproc_per_node 2 experiments/mnist_vp.py --train ...
accelerate launch experiments/mnist_vp.py --train ...
"""

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import command
from common.flags import Flags, flag

from sde_diffusion import data, plots, progress, training, validate
from sde_diffusion.files import storage


def check(flags: Flags) -> None:
    """Refuse values out of range."""
    for name in ("checkpoint_every", "accumulate", "extend_to"):
        if getattr(flags, name) is not None:
            validate.integer(flag(name), getattr(flags, name), at_most=10**7)
    if flags.resume and flags.overwrite:
        raise ValueError("give --resume or --overwrite, not both")
    for name in ("extend_to", "changed"):
        if getattr(flags, name) is not None and not flags.resume:
            raise ValueError(f"{flag(name)} has no effect without --resume")
    if flags.tracker in ("tensorboard", "wandb") and not find_spec(flags.tracker):
        raise ValueError(f"--tracker {flags.tracker}: not installed; pip install {flags.tracker}")


def engine(flags: Flags, device: str, out: Path) -> Any:
    """Return accelerate's engine for the launched processes.

    Raises:
        ValueError: with --resume, if the folder holds no run; nothing is made then.
    """
    if flags.resume and training.newest_checkpoint(out) is None:
        there = "" if out.is_dir() else "no such folder; "
        raise ValueError(f"--resume: {out} holds no checkpoint; {there}without --resume, a new run "
                         f"starts there")  # fmt: skip
    default = "tensorboard" if find_spec("tensorboard") else "none"
    tracker = flags.tracker or default
    return training.launched(
        None if device == "auto" else device,
        compiled=flags.compile,
        trackers=[] if tracker == "none" else [tracker],
        folder=out / "trackers",
    )


def dtype(given: str | None) -> Any:
    """Return --dtype, or the precision that accelerate was launched with."""
    launched = training.precision()
    if given and launched != "float32" and given != launched:
        raise ValueError(f"--dtype {given}, but accelerate was launched with {launched}")
    return given or launched


def extended(flags: Flags, recipe: training.Recipe) -> training.Recipe:
    """Return the recipe with the number of steps of --extend-to, and the rest unchanged."""
    if flags.extend_to is None:
        return recipe
    if flags.extend_to < recipe.steps:
        raise ValueError(f"--extend-to must be at least {recipe.steps}, the steps of the run; "
                         f"got {flags.extend_to}")  # fmt: skip
    return replace(recipe, steps=flags.extend_to)


def record(state: training.TrainState) -> dict[str, object]:
    """Return the facts that the files of a run hold: how it was made, and with what settings."""
    made = {"command": command.command(), "commit": command.commit(), **state.settings}
    return {**made, "changes": state.changes} if state.changes else made


def begin(
    flags: Flags, state: training.TrainState, out: Path, *files: str, flag: str = "--out"
) -> None:
    """Prepare the folder for this state; with --resume, continue its run.

    Call it after all other checks: a run that cannot start must not delete another.

    Args:
        files: patterns of the files that a run writes beside its checkpoints.
        flag: the script's flag for the folder.
    """
    engine = state.engine
    parts = flags.accumulate or training.accumulation()
    if state.recipe.batch_size < parts * engine.num_processes:
        raise ValueError(
            f"--accumulate {parts}: a batch of {state.recipe.batch_size} has no part for each of "
            f"{engine.num_processes} processes"
        )
    prepare(flags, out, engine, *files, flag=flag)
    resume(flags, state, out)
    track(state, out)


def track(state: training.TrainState, out: Path) -> None:
    """Start the tracker, if there is one."""
    engine: Any = state.engine
    if not getattr(engine, "log_with", None):
        return
    try:  # a kill may have logged steps that will be made again
        engine.init_trackers(out.name, init_kwargs={"tensorboard": {"purge_step": state.step}})
    except Exception as error:  # of any type: accounts, networks
        raise ValueError(f"--tracker: {' '.join(str(error).split())}") from None


def prepare(flags: Flags, out: Path, engine: Any, *files: str, flag: str = "--out") -> None:
    """Make --out ready for a run that is new, resumed or to be replaced.

    Args:
        files: patterns of the files that a run writes beside its checkpoints.
        flag: the script's flag for the folder.
    """
    if engine.is_main_process:
        command.folder(out)
        own = [*training.saved(out), *(path for name in files for path in out.glob(name))]
        if flags.overwrite:
            for path in own:
                linked = path.is_symlink() or not path.is_dir()
                path.unlink() if linked else shutil.rmtree(path)
        elif own and not flags.resume:
            raise ValueError(
                f"{flag} {out} holds a run: give --resume, --overwrite or another folder"
            )
    engine.wait_for_everyone()


def resume(flags: Flags, state: training.TrainState, out: Path) -> None:
    """With --resume, continue the run in --out, and print where."""
    if not flags.resume:
        return
    changed = {*(flags.changed or ()), *(["steps"] if flags.extend_to else [])}
    _, damaged = training.resume(state, out, changed)
    if state.engine.is_main_process:
        for line in damaged:
            print(f"passed over: {line}", file=sys.stderr)
        print(f"resuming at step {state.step}")


def steps(
    flags: Flags, state: training.TrainState, given: data.Data, out: Path, **record: object
) -> Iterator[training.Metrics]:
    """Make the remaining steps of a run, each in metrics.csv, with checkpoints.

    Ctrl-C and SIGTERM save and exit, 130 and 143. At the end there is loss.png.

    Raises:
        ConnectionError: if another process of the run is gone.
    """
    engine: Any = state.engine
    total, main = state.recipe.steps, engine.is_main_process
    every = flags.checkpoint_every or min(500, max(1, total // 10))
    log = engine.log if getattr(engine, "log_with", None) else None
    made = training.train(state, given, flags.accumulate or training.accumulation())
    bar = progress.bar(made, total=total, initial=state.step, disable=not main)
    journal = training.Journal(out, state.step, log) if main else None
    with training.Stop() as stop, journal or nullcontext():
        try:
            for metrics in bar:
                if journal:
                    journal.write(metrics)
                    bar.set_postfix(loss=f"{metrics.loss:.3f}", refresh=False)
                stopped = stop.requested(engine)
                if stopped or metrics.step % every == 0 or metrics.step == total:
                    if journal:
                        journal.flush()
                    training.save(state, out, **record)
                if stopped:
                    finish(engine)
                    sys.exit(stop.code)
                yield metrics
        except RuntimeError as error:
            if not command.is_loss_of_a_process(error):
                raise
            raise ConnectionError(
                f"process {engine.process_index} of {engine.num_processes} stops at step "
                f"{state.step}: another one is gone; --resume goes on from the last checkpoint"
            ) from error
    if journal:
        draw_loss(out)


def finish(engine: Any) -> None:
    """End the part of a program that all processes run."""
    engine.wait_for_everyone()
    if hasattr(engine, "end_training"):
        engine.end_training()


def last_loss(out: Path) -> dict[str, float]:
    """Return the mean of the finite losses of the last 1,000 steps of the run in `out`, by name.

    Of a run of fewer than 10,000 steps it is the last tenth: the beginning does not count.
    """
    curve = finite(out)
    count = min(1000, -(-len(curve) // 10))
    mean = sum(loss for _, loss in curve[-count:]) / count if count else math.nan
    return {f"loss_of_last_{count}_steps": mean}


def draw_loss(out: Path) -> None:
    """Write loss.png of the run in `out`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5))
    curve = finite(out)
    if not curve:
        return
    plots.loss_curve(figure.subplots(), [step for step, _ in curve], [loss for _, loss in curve])
    storage.replace(out / "loss.png", plots.png(figure))


def finite(out: Path) -> list[tuple[int, float]]:
    """Return steps and losses, without skipped steps."""
    return [(m.step, m.loss) for m in training.history(out) if math.isfinite(m.loss)]
