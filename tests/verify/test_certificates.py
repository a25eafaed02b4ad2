"""Every shipped sampler's certificate is a test: experiments/certify.py's samplers and processes.

By default each sampler on two processes at few steps, where every check holds already; the whole
product at certify's own sizes is marked slow.
"""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import is_dataclass, replace
from pathlib import Path

import certify as CERTIFY
import pytest
from common import command
from PIL import Image

import sde_diffusion as sd
from sde_diffusion import samplers, verify

ROOT = Path(__file__).parents[2]


# Sub-VP and EDM: there the rates have settled at 16 steps for every sampler. Elsewhere they need
# more: 512 for Euler-Maruyama on VE, 64 for DDPM's large variance on VP, 2,048 for DDPM's on OU.
PROCESSES = ("sub-vp", "edm")
SIZES = (16, 32, 64, 128)
FIXED = [n for n in CERTIFY.SAMPLERS if n not in CERTIFY.BY_TOLERANCE | CERTIFY.BY_BIAS]


def test_every_sampler_of_the_package_is_certified_and_every_process():
    certified = {type(sampler).__name__ for sampler in CERTIFY.SAMPLERS.values()}
    rules = {name for name, thing in vars(samplers).items() if is_sampler(thing)}
    assert certified == rules
    shipped = {name for name in sd.processes.__all__ if is_process(getattr(sd.processes, name))}
    assert {type(process).__name__ for process in CERTIFY.PROCESSES.values()} >= shipped


def is_sampler(thing):
    return isinstance(thing, type) and is_dataclass(thing) and hasattr(thing, "step")


def is_process(thing):
    return (
        isinstance(thing, type)
        and issubclass(thing, sd.processes.Process)
        and not getattr(thing, "__abstractmethods__", None)
    )


def test_each_sampler_is_certified_once_and_by_the_check_that_fits_it():
    """Fixed steps and an order: the exact law. Tolerances of an ODE, or no injected noise: else."""
    assert len(set(CERTIFY.SAMPLERS.values())) == len(CERTIFY.SAMPLERS) == len(samplers.CATALOGUE)
    assert not CERTIFY.BY_TOLERANCE & CERTIFY.BY_BIAS
    assert all(CERTIFY.SAMPLERS[name].claims.order is not None for name in FIXED)
    assert all(CERTIFY.SAMPLERS[name].claims.order is None for name in CERTIFY.BY_TOLERANCE)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_step_samplers_certificate_holds(name, process):
    made = verify.certificate(
        CERTIFY.SAMPLERS[name],
        CERTIFY.gaussian(CERTIFY.PROCESSES[process]),
        sizes=SIZES,
    )
    assert made.holds, made.verdict
    assert made.verdict == "all checks hold"
    assert None not in (made.local_order, made.limit)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", sorted(CERTIFY.BY_TOLERANCE | CERTIFY.BY_BIAS))
def test_the_certificate_of_a_sampler_with_its_own_steps_or_noise_holds(name, process):
    row = CERTIFY.ours(name, process)
    assert row.holds, row.verdict
    assert row.by == ("tolerance" if name in CERTIFY.BY_TOLERANCE else "Monte Carlo")


@pytest.mark.slow
@pytest.mark.parametrize("process", CERTIFY.PROCESSES)
@pytest.mark.parametrize("name", CERTIFY.SAMPLERS)
def test_the_whole_product_holds_or_fails_for_the_reason_that_is_known(name, process):
    row = CERTIFY.ours(name, process)
    known = (name, process) in CERTIFY.NOT_SETTLED
    assert row.holds != known, row.verdict
    assert bool(row.known) == known


def test_a_certificate_is_all_its_parts_and_fails_with_one():
    made = verify.certificate(sd.Heun(), CERTIFY.gaussian(sd.EDM()), sizes=SIZES)
    assert made.holds
    faulty = {
        "order": replace(made.order, declared=3),
        "limit": replace(made.limit, mean=made.limit.mean + 1),
        "local_order": replace(made.local_order, declared=(2, 3)),
    }
    for name, part in faulty.items():
        other = replace(made, **{name: part})
        assert not other.holds
        assert other.verdict == part.verdict
    text = str(made)
    for part in (made.law, made.order, made.local_order, made.limit):
        assert str(part) in text
    assert text.count("does not prove:") == 4


# ---- the script -------------------------------------------------------------------------------


def run(*arguments):
    """The script as a process."""
    environment = os.environ | {"PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "experiments" / "certify.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def run_here(*arguments):
    """The same in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["experiments/certify.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            command.run(CERTIFY.main, CERTIFY.Config)
    return subprocess.CompletedProcess(
        ["certify"], ended.value.code, out.getvalue(), err.getvalue()
    )


def test_the_script_writes_a_table_figures_a_picture_and_its_flags(tmp_path):
    out = tmp_path / "made"
    done = run("--samplers", "adams", "--processes", "vp", "--out", out)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {
        "certificates.md", "certificates.json", "certificates.png", "config.json"
    }  # fmt: skip
    (row,) = json.loads((out / "certificates.json").read_text())
    assert (row["sampler"], row["process"], row["by"]) == ("adams", "vp", "exact law")
    assert row["holds"] is True
    assert row["figures"]["declared"] == "3"
    assert float(row["figures"]["order"]) >= 2.8
    assert row["report"].count("does not prove:") == 5  # its four checks and the mixture
    table = (out / "certificates.md").read_text()
    header, rule, line, *_ = table.splitlines()
    assert header.count("|") == rule.count("|") == line.count("|")
    assert line.startswith("| adams | vp | exact law | 3 |")
    assert line.endswith("| yes |")
    assert table in done.stdout
    assert "1 of 1 hold" in done.stdout
    with Image.open(out / "certificates.png") as image:
        image.load()
        assert min(image.size) > 100
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["samplers"] == ["adams"]
    assert config["flags"]["processes"] == ["vp"]


REFUSALS = {
    "--samplers dpm": "--samplers must be a known name; got dpm; near it: dpm-solver",
    "--processes brownian": "--processes must be a known name; got brownian; known: vp",
    "--samplers heun --processes edm brownian": "--processes must be a known name",
    "--sampelrs heun": "--sampelrs",
    "--peers --processes vp": "--processes: with --peers each sampler has its own",
    "--peers maybe": "maybe",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_a_bad_flag_is_one_line_and_exit_2_and_nothing_is_written(tmp_path, flags):
    out = tmp_path / "out"
    done = run_here(*flags.split(), "--out", out)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert REFUSALS[flags] in done.stderr
    assert not out.exists()


def test_a_file_in_the_place_of_the_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("kept")
    done = run_here("--out", tmp_path / "file")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out")
    assert "not a folder" in done.stderr
    assert done.stdout == ""
    assert (tmp_path / "file").read_text() == "kept"
