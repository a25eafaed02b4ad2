"""Flags: read before torch, names in any case, and one reason for each value that cannot be one."""

import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import pytest
from common import flags, words

ROOT = Path(__file__).parents[2] / "experiments"
PROGRAMS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.rglob("*.py"))
    if "command.run(main, Config" in path.read_text()
]


@dataclass(frozen=True)
class Config:
    """Flags of every kind."""

    sampler: flags.SamplerName = "ode"
    weight: Annotated[Literal["min-snr", "none"] | None, flags.default("none")] = None
    calls: tuple[int, ...] = (5,)
    scale: tuple[float, ...] = (1.0,)
    rate: float = 0.1
    seed: int = 0
    checkpoint: Annotated[flags.ExistingPath | None, flags.default("none")] = None
    train: bool = False
    out: Path = Path("runs")


def parse(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *arguments])
        return flags.parse(Config)


def test_help_and_a_wrong_flag_come_before_torch_is_imported():
    """In one process for all scripts: what it imports stays imported, torch must not be there."""
    code = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    for flag, status in (("--help", 0), ("--nonsense", 2), ("--out=", 2)):
        sys.argv = [script, flag]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                assert (end.code or 0) == status, (script, flag, end.code)
        assert "torch" not in sys.modules, script
        assert status == 0 or err.getvalue().count("\\n") == 1, err.getvalue()
        assert status or "examples:" in out.getvalue(), script
"""
    scripts = [ROOT / f"{name.replace('.', '/')}.py" for name in PROGRAMS]
    line = [sys.executable, "-c", code, *map(str, scripts)]
    done = subprocess.run(
        line, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", PROGRAMS)
def test_names_are_taken_in_any_case(script):
    config = importlib.import_module(script).Config
    for field, hint in get_type_hints(config, include_extras=True).items():
        marks = [kind for kind in flags.leaves(hint) if isinstance(kind, flags.Names)]
        for name in marks[0].known if marks else ():
            for given in (name.upper(), name.title()):
                arguments = [flags.flag(field), given]
                assert flags.checked(config, arguments) == [flags.flag(field), name]
                joined = [f"{flags.flag(field)}={given}"]
                assert flags.checked(config, joined) == [f"{flags.flag(field)}={name}"]


def test_values_are_parsed_as_they_are_declared():
    found = parse("--sampler", "DDIM", "--weight=Min-SNR", "--calls", "5", "10", "--seed", "-1",
                  "--scale", "-1", "1e3", "--train", "--out", "VP")  # fmt: skip
    assert found == Config("ddim", "min-snr", (5, 10), (-1.0, 1000.0), seed=-1, train=True,
                           out=Path("VP"))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            "--sampler dpm",
            "--sampler must be a known name; got dpm; near it: dpm2, dpm3",
        ),
        ("--sampler=DPM", "--sampler must be a known name; got DPM; near it: dpm2"),
        ("--weight minsnr", "--weight must be a known name; got minsnr; known: min-snr, none"),
        ("--seed 1e3", "--seed must be an integer; got 1e3"),
        ("--seed=x", "--seed must be an integer; got x"),
        ("--rate fast", "--rate must be a number; got fast"),
        ("--calls 5 ten", "--calls must be an integer; got ten"),
        ("--calls --train", "--calls must have one or more values; got none"),
        ("--calls", "--calls must have one or more values; got none"),
        ("--calls 5 10 5", "--calls must have different values; got 5 10 5"),
        ("--scale 1 1.0", "--scale must have different values; got 1 1.0"),
        ("--checkpoint nowhere/x", "--checkpoint must be a path that exists; got nowhere/x"),
        ("--seed", "Missing value for argument '--seed'"),
        ("--seed 1 2", "Unrecognized options: 2"),
        ("--train yes", "Unrecognized options: yes"),
        ("--sampelr ode", "--sampelr, ode Perhaps you meant: --sampler"),
    ],
)
def test_a_wrong_value_has_its_own_reason(arguments, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        parse(*arguments.split())
    assert "--- " not in str(raised.value)  # the parser's frame, which is ASCII on such a stream


def test_a_long_list_of_names_that_is_cut_is_marked():
    with pytest.raises(ValueError, match=r"known: a0, a1, .*, a7, \.\.\.$"):
        words.match("--name", "zzz", [f"a{k}" for k in range(9)])
    with pytest.raises(ValueError, match=r"known: a0, .*, a7$"):
        words.match("--name", "zzz", [f"a{k}" for k in range(8)])


def test_flags_that_differ_from_their_default_are_refused_where_they_have_no_effect():
    flags.unused(Config(seed=0), ("seed",), "here")
    with pytest.raises(ValueError, match="--seed has no effect here"):
        flags.unused(Config(seed=1), ("seed", "rate"), "here")


def test_a_refusal_is_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as ended:
        flags.refuse(ValueError("two\nlines"))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: two lines\n"


def test_the_help_shows_the_tolerances_that_the_samplers_have():
    """They are typed there, because --help needs no torch."""
    samplers = importlib.import_module("common.samplers").SAMPLERS
    text = re.search(r'default\("(.*); adaptive-sde (.*)"\)', (ROOT / "mnist_vp.py").read_text())
    assert text is not None
    shown = dict(zip(("ode", "adaptive-sde"), map(float, text.groups()), strict=True))
    shown["adaptive-ode"] = shown["ode"]
    assert shown == {name: samplers[name].rtol for name in shown}
