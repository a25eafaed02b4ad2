"""What the scripts share: flags in, one line and exit 2 for bad ones, whole files out."""

import contextlib
import io
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import tyro

import sde_diffusion as sd
from sde_diffusion.files import storage

Config = TypeVar("Config")

# The words of the scripts for processes, all at their published parameters.
PROCESSES: dict[str, sd.processes.Process] = {
    "vp": sd.VP(),
    "sub-vp": sd.SubVP(),
    "ve": sd.VE(),
    "ou": sd.OU(),
    "cosine": sd.Cosine(),
    "edm": sd.EDM(),
    "rectified": sd.RectifiedFlow(),
    "ddpm": sd.Discrete.linear(),
}

REFUSALS = (ValueError, OSError, FloatingPointError, sd.SolverError)


def run(main: Callable[[Config], None], config: type[Config]) -> None:
    """Parse the flags and run; what the user can mend ends in one line on stderr and exit 2.

    Ctrl-C and SIGTERM exit with 130 and 143; a training run saves first, see training.Stop.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main(parse(config))
    except REFUSALS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, ConnectionError):
            leave(2)
        sys.exit(2)
    except RuntimeError as error:
        if not is_loss_of_a_process(error):
            raise
        print("error: another process of this run is gone", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def is_loss_of_a_process(error: RuntimeError) -> bool:
    """Whether this is how a collective call says that another process of the run is gone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection", "NCCL")
    )


def leave(code: int) -> NoReturn:
    """Exit at once, without Python's own shutdown.

    When another process of a run is gone, threads of torch.distributed may still be in a call to
    it, and one that asks for the interpreter while it shuts down ends in SIGABRT.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parse(config: type[Config]) -> Config:
    """The flags, or the parser's complaint as one ValueError."""
    complaint = io.StringIO()
    for argument in sys.argv[1:]:
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            raise ValueError(f"an argument is empty: {argument or repr(argument)}")
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        lines = re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", complaint.getvalue()).splitlines()
        told = " ".join(" ".join(lines[1:]).split())  # the first line is only the frame's title
        raise ValueError(
            re.split(r"Argument helptext|Got errors|For full helptext", told)[0]
        ) from None


def device(name: str) -> torch.device:
    """auto, cpu, cuda or mps; a device that is asked for must be there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, usable in there.items() if usable), "cpu"))
    if not there.get(name, True):
        raise ValueError(f"--device {name}: this machine has none that torch can use")
    return torch.device(name)


def check_out(path: Path, flag: str = "--out") -> None:
    """Refuse an --out that cannot become a folder, before any work is done."""
    there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(f"{flag} {path}: {'' if there == path else f'{there} is '}not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: {there} cannot be written to")


def folder(path: Path) -> Path:
    """The folder `path`, made if need be; call it when there is something to write."""
    check_out(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_config(out: Path, config: Any, **facts: Any) -> None:
    """config.json: the flags, and what is needed to explain a figure later."""
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
    """The command line as it was given."""
    return shlex.join(["python", *sys.argv])


def commit() -> str:
    """The commit of the checkout, or `unknown`."""
    ask = ["git", "rev-parse", "HEAD"]
    try:
        asked = subprocess.run(ask, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return "unknown"
    return asked.stdout.strip() or "unknown"
