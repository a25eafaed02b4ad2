"""Shared by the scripts: flags in, one line and exit 2 for bad ones, whole files out."""

import contextlib
import io
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from common import flags
from common.words import by_word
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import progress
from sde_diffusion.files import storage

Config = TypeVar("Config")

# The package's catalogue, and short names: flags.PROCESS_NAMES.
PROCESSES: dict[str, sd.processes.Process] = by_word(sd.processes.CATALOGUE) | {
    "rectified": sd.RectifiedFlow(),
    "ddpm": sd.Discrete.linear(),
}

LONGEST = ".checkpoint-12345678.part/made/training.safetensors.part"  # file that a run writes

REFUSALS = (ValueError, OSError, FloatingPointError, sd.SolverError)


def run(
    main: Callable[[Config], None], config: type[Config], *, use_underscores: bool = False
) -> None:
    """Parse the flags and run; an error that the user can correct is one line and exit 2.

    Ctrl-C and SIGTERM exit with 130 and 143; a training run saves first, see training.Stop.

    Args:
        use_underscores: as in `flags.parse`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that this console cannot show is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main(flags.parse(config, use_underscores=use_underscores))
    except REFUSALS as error:
        if isinstance(error, ConnectionError):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            leave(2)
        flags.refuse(error)
    except RuntimeError as error:
        if not is_loss_of_a_process(error):
            raise
        print("error: another process of this run is gone", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def finite(samples: Tensor, maker: object) -> Tensor:
    """Return samples (N, ...) if all are finite: for every script that samples, before it writes.

    Args:
        maker: named in the error.
    """
    failed = (~samples.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if failed:
        raise FloatingPointError(
            f"{len(failed)} of {len(samples)} samples of {maker} are not finite, the first is "
            f"number {failed[0]}: nothing is written"
        )
    return samples


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Leave out the warning of samples that are not finite, where a script itself refuses them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not finite", RuntimeWarning)
        yield


def sampled(
    maker: object, model: sd.models.Model, sampler: sd.samplers.Sampler, x: Tensor, **settings: Any
) -> Tensor:
    """Return `sd.sample(model, sampler, x, **settings)` if all samples are finite."""
    with unwarned():
        return finite(sd.sample(model, sampler, x, **settings), maker)


def load(path: Path, flag: str = "--checkpoint") -> sd.Denoiser:
    """Return the denoiser of the file that a flag names."""
    flags.existing(flag, path)
    if path.suffix in (".pt", ".pth", ".ckpt"):
        raise ValueError(
            f"{flag} {path}: a file of torch.save, which may hold code; import it first: "
            f"python experiments/import_weights.py"
        )
    if path.is_dir() or path.suffix != ".safetensors":
        kind = "the folder " if path.is_dir() else ""
        raise ValueError(f"{flag} must be a .safetensors file; got {kind}{path}")
    return sd.Denoiser.load(path)


def is_loss_of_a_process(error: RuntimeError) -> bool:
    """Return True if a collective call failed because another process of the run is gone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection", "NCCL")
    )


def leave(code: int) -> NoReturn:
    """Exit at once, without Python's own shutdown.

    When another process of a run is gone, threads of torch.distributed may still wait for it; one
    that returns to the interpreter during its shutdown ends in SIGABRT.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def network_calls(network: torch.nn.Module, name: str, total: int | None = None) -> Iterator[Any]:
    """Show a bar on stderr that counts the calls of a network, in `n`.

    Args:
        name: shown before the bar.
        total: number of calls, if it is known.
    """
    with progress.bar(desc=name, total=total, unit=" calls", leave=False) as bar:

        def count(*_: object) -> None:
            bar.update()

        hook = network.register_forward_hook(count)
        try:
            yield bar
        finally:
            hook.remove()


def device(name: str) -> torch.device:
    """Return the device of auto, cpu, cuda or mps; a device that is named must be there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, usable in there.items() if usable), "cpu"))
    if not there.get(name, True):
        raise ValueError(f"--device {name}: torch finds none on this machine")
    return torch.device(name)


def check_name(path: Path, flag: str = "--out") -> None:
    """Refuse a path with a name that this system cannot give to a file: too long, for example."""
    place = path.absolute()
    there = next(part for part in (place, *place.parents) if os.path.lexists(part))
    # A name in a folder that is not there yet is looked up where there is one.
    for name in (place, *(there / part.name for part in (place, *place.parents))):
        try:
            os.lstat(name)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{flag}: {reason}: {name.name!s:.80}") from None


def check_out(path: Path, flag: str = "--out") -> None:
    """Refuse an --out that cannot become a folder, before any work is done."""
    check_name(path / LONGEST, flag)
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(f"{flag} {path}: {'' if there == path else f'{there} is '}not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: {there} cannot be written to")


def folder(path: Path) -> Path:
    """Make the folder `path` if needed; call it when there is something to write."""
    check_out(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_config(out: Path, config: Any, **facts: Any) -> None:
    """Write config.json: the flags, and what explains a figure later."""
    record = {
        "flags": asdict(config),
        "command": command(),
        "commit": commit(),
        "versions": {
            "sde_diffusion": sd.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        **facts,
    }
    storage.replace(
        out / "config.json", (json.dumps(record, indent=1, default=str) + "\n").encode()
    )


def command() -> str:
    """Return the command line."""
    return shlex.join(["python", *sys.argv])


def commit() -> str:
    """Return the commit of the checkout, or `unknown`."""
    line = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"
