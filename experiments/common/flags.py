"""Flags of the scripts, which need no torch: --help and a wrong flag take 0.2 seconds, not 2.

A script declares its flags above its other imports, and checks them there:

    from common import flags

    @dataclass(frozen=True)
    class Config: ...

    if __name__ == "__main__":
        flags.check(Config)

    import torch
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro
from common import words

Config = TypeVar("Config")

# ---- types of flags ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Mark of a flag that takes one of these names, in any case, as a Literal does."""

    known: tuple[str, ...]


@dataclass(frozen=True)
class Existing:
    """Mark of a flag that takes the path of a file or folder that exists."""


def default(text: str) -> Any:
    """Return what --help shows in place of a default of None."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


def flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def unused(config: Any, names: Iterable[str], why: str, spell: Callable[[str], str] = flag) -> None:
    """Refuse flags without effect that are given: that differ from their default."""
    names = set(names)
    for field in fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            raise ValueError(f"{spell(field.name)} has no effect {why}")


# Names of the package's catalogues, and short ones. They are typed here, because the catalogues
# need torch; a test compares them.
PROCESSES = ("vp", "sub-vp", "ve", "ou", "cosine", "edm", "rectified-flow", "discrete",
             "interpolated")  # fmt: skip
SAMPLERS = (
    "ancestral", "ancestral-beta", "ancestral-eta-0", "euler-maruyama", "torch-sde",
    "torch-sde-milstein", "torch-sde-srk", "heun", "churn-heun-s-churn-10", "dpm-solver",
    "dpm-solver-k-3", "dpm-solver-eta-1", "velocity-multistep", "langevin-heun", "adams-k-1",
    "adams-k-2", "adams", "adams-k-4", "adams-k-5", "torch-ode", "scipy-ode", "adaptive-ode",
    "adaptive-sde",
)  # fmt: skip
SHORT = ("ode", "adaptive-ode", "adams", "dpm2", "dpm3", "ddim", "sde", "torchsde", "sde-dpm2",
         "multistep", "churn", "langevin")  # fmt: skip
UNSEEDED = ("torch-sde-srk",)  # torchsde draws its path: not by (seed, k)
PROCESS_NAMES = (*PROCESSES, "rectified", "ddpm")
SAMPLER_NAMES = (*SHORT, *(name for name in SAMPLERS if name not in (*SHORT, *UNSEEDED)))

PROCESS_HELP = f"process from data to noise: {', '.join(PROCESS_NAMES)}"
SAMPLER_HELP = (
    "ode: dopri5 on the probability flow; adams: the setting of Adams.auto for --steps; dpm2, "
    "dpm3: DPM-Solver++; sde: Euler-Maruyama of the reverse SDE; multistep: stochastic, by "
    "velocities; langevin: ancestral with corrections. All names: " + ", ".join(SAMPLER_NAMES)
)
USUAL_STEPS = "heun 18, stochastic of order 2 50, others of order 2 and more 20, order 1 250"

ExistingPath = Annotated[Path, Existing()]
ProcessName = Annotated[str, Names(PROCESS_NAMES), tyro.conf.arg(metavar="NAME", help=PROCESS_HELP)]
SamplerName = Annotated[str, Names(SAMPLER_NAMES), tyro.conf.arg(metavar="NAME", help=SAMPLER_HELP)]
FrameName = Literal["straight", "gaussian"]
FeaturesName = Literal["efficientnet", "inception"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Flags:
    """How training runs; up to rounding the result does not depend on these."""

    resume: bool = False
    """(train) continue from the newest checkpoint in the folder, which must hold one"""
    extend_to: Annotated[int | None, default("the run's own length")] = None
    """(train) with --resume and the run's other flags: go on to this number of steps in all"""
    changed: Annotated[tuple[str, ...] | None, default("none")] = None
    """(train) with --resume: settings that may differ from those of the run, like learning_rate"""
    overwrite: bool = False
    """(train) delete the run in the folder first"""
    checkpoint_every: Annotated[int | None, default("500, or a tenth of the run")] = None
    """(train) steps between checkpoints"""
    accumulate: Annotated[int | None, default("1")] = None
    """(train) parts of each process's share of a batch, to save memory"""
    compile: bool = False
    """(train) compile the network with torch.compile"""
    on_bad: Annotated[Literal["raise", "skip"] | None, default("raise")] = None
    """(train) at a loss that is not finite: stop, or skip the step and count it"""
    tracker: Annotated[
        Literal["tensorboard", "wandb", "none"] | None,
        default("tensorboard if installed, else none"),
    ] = None
    """(train) tracker beside metrics.csv"""


# ---- parsing -----------------------------------------------------------------------------------


def check(config: type[Any], *, use_underscores: bool = False) -> None:
    """Parse the flags before torch is imported: --help ends here, and a wrong flag with exit 2."""
    try:
        parse(config, use_underscores=use_underscores)
    except ValueError as error:
        refuse(error)


def refuse(error: BaseException) -> NoReturn:
    """Print an error that the user can correct as one line, and exit with 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def parse(config: type[Config], *, use_underscores: bool = False) -> Config:
    """Return the flags; raise the parser's complaint as one ValueError. --help ends in examples.

    Args:
        use_underscores: show flags with underscores in --help; both forms are accepted always.
    """
    complaint = io.StringIO()
    for argument in sys.argv[1:]:
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            raise ValueError(f"an argument is empty: {argument or repr(argument)}")
    arguments = checked(config, sys.argv[1:])
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, args=arguments, use_underscores=use_underscores, config=markers)
    except SystemExit as end:
        if not end.code:  # --help
            print("\n".join(["examples:", *examples(sys.modules[config.__module__])]))
            raise
        # The frame is drawn in boxes, or in ASCII where the stream has none.
        frame = re.compile(r"\x1b\[[0-9;]*m|[─-╿]|^[+|]|[+|]$|-{3,}", re.MULTILINE)
        lines = frame.sub(" ", complaint.getvalue()).splitlines()[1:]  # without the title
        message = " ".join(" ".join(lines).split())
        message = re.split(r"Argument helptext|Got errors|For full helptext", message)[0]
        near = re.search(r"Perhaps you meant: (--\S+)", message)
        if near:
            message = f"{message[: near.start()]}{near[0]}"
        raise ValueError(message.strip()) from None


def checked(config: type[Any], arguments: Sequence[str]) -> list[str]:
    """Return the arguments with names as they are declared; refuse values of another kind."""
    hints = get_type_hints(config, include_extras=True)
    made: list[str] = []
    name, kinds, values = "", list[Any](), list[str]()

    def close() -> None:
        if Ellipsis not in kinds:
            return
        if not values:
            raise ValueError(f"{name} must have one or more values; got none")
        numbers = {float, int} & {kind for kind in kinds if isinstance(kind, type)}
        if len({float(text) if numbers else text for text in values}) < len(values):
            raise ValueError(f"{name} must have different values; got {' '.join(values)}")

    for argument in arguments:
        given, start = argument, ""
        if argument.startswith("--"):
            close()
            name, sign, given = argument.partition("=")
            kinds, values = list(leaves(hints.get(name[2:].replace("-", "_")))), []
            start = name + sign
        if not given or (values and Ellipsis not in kinds):
            made.append(argument)  # a flag, or a value that the parser will refuse
        else:
            values.append(value(name, kinds, given))
            made.append(start + values[-1])
    close()
    return made


def leaves(hint: Any) -> Iterator[Any]:
    """Iterate over the parts of a type hint: types, marks, and ... of a tuple."""
    if get_origin(hint) is Literal:
        yield Names(get_args(hint))
    elif get_args(hint):
        for part in get_args(hint):
            yield from leaves(part)
    else:
        yield hint


def value(flag: str, kinds: Sequence[Any], given: str) -> str:
    """Return a value as it is declared; refuse a name, number or path that cannot be one."""
    for kind in kinds:
        if isinstance(kind, Names):
            return words.match(flag, given, kind.known)
        if isinstance(kind, Existing):
            existing(flag, Path(given))
        if kind is int or kind is float:
            try:
                kind(given)
            except ValueError:
                what = "an integer" if kind is int else "a number"
                raise ValueError(f"{flag} must be {what}; got {given}") from None
    return given


def existing(flag: str, path: Path) -> Path:
    """Return a path that exists."""
    if not path.exists():
        raise ValueError(f"{flag} must be a path that exists; got {path}")
    return path


def examples(script: ModuleType) -> list[str]:
    """Return the command lines in a script's docstring."""
    lines = (script.__doc__ or "").replace("\\\n", " ").splitlines()
    return [f"  {' '.join(line.split())}" for line in lines if line.startswith("    python ")]
