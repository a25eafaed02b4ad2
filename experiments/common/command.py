"""Shared by the scripts: flags in, one line and exit 2 for bad ones, whole files out."""

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
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import torch
import tyro
from common.words import by_word
from tqdm import tqdm

import sde_diffusion as sd
from sde_diffusion.files import storage

Config = TypeVar("Config")

# The package's catalogue, and short names.
PROCESSES: dict[str, sd.processes.Process] = by_word(sd.processes.CATALOGUE) | {
    "rectified": sd.RectifiedFlow(),
    "ddpm": sd.Discrete.linear(),
}
PROCESS_HELP = f"process from data to noise: {', '.join(PROCESSES)}"
ProcessWord = Annotated[str, tyro.conf.arg(metavar="NAME", help=PROCESS_HELP)]
Device = Literal["auto", "cpu", "cuda", "mps"]

# Colours and frames of the parser's messages: box characters, or hyphens where stdout has none.
FRAMES = re.compile(r"\x1b\[[0-9;]*m|[─-╿]|^[ \t]*-+[ \t]*$", re.MULTILINE)

LONGEST = ".checkpoint-12345678.part/made/training.safetensors.part"  # file that a run writes

REFUSALS = (ValueError, OSError, FloatingPointError, sd.SolverError)


def run(
    main: Callable[[Config], None], config: type[Config], *, use_underscores: bool = False
) -> None:
    """Parse the flags and run; an error that the user can correct is one line and exit 2.

    Ctrl-C and SIGTERM exit with 130 and 143; a training run saves first, see training.Stop.

    Args:
        use_underscores: show flags with underscores in --help; both forms are accepted always.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that this console cannot show is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main(parse(config, use_underscores=use_underscores))
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


def default(text: str) -> Any:
    """Return what --help shows in place of a default of None."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def parse(config: type[Config], *, use_underscores: bool = False) -> Config:
    """Return the flags; raise the parser's complaint as one ValueError. --help ends in examples."""
    complaint = io.StringIO()
    for argument in sys.argv[1:]:
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            raise ValueError(f"an argument is empty: {argument or repr(argument)}")
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, use_underscores=use_underscores, config=markers)
    except SystemExit as end:
        if not end.code:  # --help
            print("\n".join(["examples:", *examples(sys.modules[config.__module__])]))
            raise
        lines = re.sub(FRAMES, " ", complaint.getvalue()).splitlines()
        message = " ".join(" ".join(lines[1:]).split())  # the first line is the frame's title
        message = re.split(r"Argument helptext|Got errors|For full helptext", message)[0]
        near = re.search(r"Perhaps you meant: (--\S+)", message)
        if near:
            message = f"{message[: near.start()]}{near[0]}"
        raise ValueError(message.replace(", 'None'", "").replace("'None', ", "")) from None


def examples(script: ModuleType) -> list[str]:
    """Return the command lines in a script's docstring."""
    lines = (script.__doc__ or "").replace("\\\n", " ").splitlines()
    return [f"  {' '.join(line.split())}" for line in lines if line.startswith("    python ")]


@contextlib.contextmanager
def network_calls(network: torch.nn.Module, name: str, total: int | None = None) -> Iterator[Any]:
    """Show a bar on stderr that counts the calls of a network, in `n`.

    Args:
        name: shown before the bar.
        total: number of calls, if it is known.
    """
    with tqdm(desc=name, total=total, unit=" calls", leave=False) as bar:

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
