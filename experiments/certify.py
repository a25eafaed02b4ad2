"""Certificates of the samplers: their exact laws, orders and limits, and which of them hold.

    python experiments/certify.py
    python experiments/certify.py --peers

Every sampler of this package on every process, or with --peers those of diffusers, k-diffusion and
azula, by their own code. Writes certificates.md, certificates.json and certificates.png.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from common import flags


def names(title: str, known: Iterable[str]) -> Any:
    """Return the help of a flag that takes some of these names."""
    return tyro.conf.arg(
        metavar="NAME ...", help_behavior_hint="(default: all)", help=f"{title}: {', '.join(known)}"
    )


@dataclass(frozen=True)
class Config:
    """Print the table of certificates, and write it as Markdown, JSON and a picture."""

    samplers: Annotated[tuple[str, ...], names("samplers to certify", flags.SAMPLERS)] = ()
    processes: Annotated[
        tuple[Annotated[str, flags.Names(flags.PROCESS_NAMES)], ...],
        names("processes, except for peers", flags.PROCESSES),
    ] = ()
    peers: bool = False
    """certify the samplers of diffusers, k-diffusion and azula instead: pip install '.[peers]'"""
    out: Path = Path("runs/certify")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import importlib
import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from common import command, words

import sde_diffusion as sd
from sde_diffusion import plots, verify
from sde_diffusion.files import storage

MEAN, VARIANCE = 0.7, 0.25  # of the data


PROCESSES = words.by_word(sd.processes.CATALOGUE)
SAMPLERS = words.by_word(sd.samplers.CATALOGUE)


# Those without an exact law: the error of an ODE solver follows its tolerance; mean and variance
# of a sampler whose order is 0, or whose noise cannot be injected, are estimated.
BY_TOLERANCE = {"torch-ode", "scipy-ode", "adaptive-ode"}
BY_BIAS = {"langevin-heun", "torch-sde-srk", "adaptive-sde"}

# Known exceptions, and why.
SIZES = {  # the errors of VE's two halves cancel in part up to some 500 steps
    (name, "ve"): (512, 1024, 2048, 4096)
    for name in ("euler-maruyama", "torch-sde", "torch-sde-milstein")
}
NOT_SETTLED = {  # even times resolve a rate slowly that is not small at t = 0: N^-1 log N
    ("ancestral", "ou"): "order of log N / N: rates 0.6 to 0.7 up to 2,048 steps",
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        by: the kind of check.
        figures: short texts by column.
        holds: True if every check does.
        verdict: checks that do not hold.
        known: the reason, if it is known.
        report: the certificate.
        seconds: time of the checks.
    """

    sampler: str
    process: str
    by: str
    figures: dict[str, str]
    holds: bool
    verdict: str
    known: str
    report: str
    seconds: float


def gaussian(process: sd.processes.Process) -> sd.exact.Gaussian:
    """Return the data, N(0.7, 0.25) on the line."""
    return sd.exact.Gaussian(process, torch.tensor([MEAN], dtype=torch.float64), VARIANCE)


def mixture(process: sd.processes.Process) -> sd.exact.GaussianMixture:
    """Return three modes in the plane, each coordinate of standard deviation about 1."""
    means = torch.tensor([[-1.2, 0.8], [0.4, -1.2], [1.3, 0.6]], dtype=torch.float64)
    return sd.exact.GaussianMixture(process, [0.4, 0.35, 0.25], means, [0.05, 0.05, 0.05])


def ours(name: str, where: str) -> Row:
    """Certify one of our samplers on one process."""
    start, sampler, process = time.perf_counter(), SAMPLERS[name], command.PROCESSES[where]
    data = gaussian(process)
    if name in BY_TOLERANCE:
        tolerances = verify.tolerances(sampler, data)
        end = verify.endpoint(sampler, mixture(process))
        figures = {
            "error / tolerance": f"{max(tolerances.ratios):.2g}",
            "mixture": f"{end.rms:.1e}",
        }
        report = f"{tolerances}\n\n{end}"
        return finished(name, where, "tolerance", figures, tolerances, report, start)
    if name in BY_BIAS:
        steps = None if sampler.claims.order is None else 200
        bias = verify.bias(sampler, data, steps=steps)
        figures = {"bias / standard error": f"{float(bias.scores.abs().max()):.1f}"}
        return finished(name, where, "Monte Carlo", figures, bias, str(bias), start)
    made = verify.certificate(sampler, data, sizes=SIZES.get((name, where), (64, 128, 256, 512)))
    figures, report = affine(made), str(made)
    if not made.law.draws:
        end = verify.endpoint(sampler, mixture(process), steps=20)
        figures["mixture"], report = f"{end.rms:.1e}", f"{report}\n\n{end}"
    return finished(name, where, "exact law", figures, made, report, start)


def affine(made: verify.Certificate) -> dict[str, str]:
    """Return the figures of a certificate by the probe."""
    figures = {"declared": f"{made.order.declared:g}", "order": f"{made.order.fitted:.2f}"}
    if made.local_order is not None:
        figures["local order"] = f"{min(made.local_order.fitted.values()):.2f}"
    if made.limit is not None:
        figures["limit"] = f"{made.limit.distance:.1e} ± {made.limit.uncertainty:.0e}"
    figures["W2"] = f"{made.order.distances[-1]:.1e} ({made.order.sizes[-1]})"
    return figures


def finished(
    sampler: str, process: str, by: str, figures: dict[str, str], made: Any, report: str,
    start: float,
) -> Row:  # fmt: skip
    known = "" if made.holds else NOT_SETTLED.get((sampler, process), "")
    seconds = time.perf_counter() - start
    return Row(sampler, process, by, figures, made.holds, made.verdict, known, report, seconds)


# ---- peers ---------------------------------------------------------------------------------------


def peers() -> dict[str, Callable[[int], sd.samplers.Sampler]]:
    """Return samplers of other libraries, as functions of the number of steps; none clips."""
    families: dict[str, Callable[[int], sd.samplers.Sampler]] = {}
    for library, found in (
        ("diffusers", diffusers_schedulers),
        ("k_diffusion", k_diffusion_functions),
        ("azula", azula_samplers),
    ):
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: left out")
        else:
            families |= found()
    if not families:
        raise ValueError("--peers: none is installed; python -m pip install -e '.[peers]'")
    return families


def diffusers_schedulers() -> dict[str, Callable[[int], sd.samplers.Sampler]]:
    diffusers: Any = importlib.import_module("diffusers")
    diffusers.logging.set_verbosity_error()
    plain = ("DDPM", "DDIM")
    chain = (
        "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep",
        "UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
        "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete", "SASolver", "EDMEuler",
        "EDMDPMSolverMultistep", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete",
    )  # fmt: skip
    made: dict[str, Any] = {}
    for name in plain:
        made[name] = getattr(diffusers, f"{name}Scheduler")(clip_sample=False)
    for name in chain:
        made[name] = getattr(diffusers, f"{name}Scheduler")()
    made["UniPCMultistep, Karras"] = diffusers.UniPCMultistepScheduler(use_karras_sigmas=True)
    made["DPMSolverMultistep, Karras"] = diffusers.DPMSolverMultistepScheduler(
        use_karras_sigmas=True
    )
    return {f"diffusers {n}": partial(verify.Diffusers, scheduler) for n, scheduler in made.items()}


def k_diffusion_functions() -> dict[str, Callable[[int], sd.samplers.Sampler]]:
    sampling: Any = importlib.import_module("k_diffusion.sampling")
    orders = {
        "euler": 1, "euler_ancestral": 1, "heun": 2, "dpm_2": 2, "dpm_2_ancestral": 1, "lms": 4,
        "dpm_fast": 3, "dpm_adaptive": 3, "dpmpp_2m": 2, "dpmpp_2s_ancestral": 1, "dpmpp_sde": 1,
        "dpmpp_2m_sde": 1, "dpmpp_3m_sde": 1,
    }  # fmt: skip

    def family(name: str, order: int, steps: int) -> sd.samplers.Sampler:
        function = getattr(sampling, f"sample_{name}")
        return verify.KDiffusion(function, sd.grids.Karras().ratios(steps), declared=order)

    return {f"k-diffusion {name}": partial(family, name, order) for name, order in orders.items()}


def azula_samplers() -> dict[str, Callable[[int], sd.samplers.Sampler]]:
    denoise, noise, sample = (
        importlib.import_module(f"azula.{name}") for name in ("denoise", "noise", "sample")
    )
    denoiser = denoise.SimpleDenoiser(torch.nn.Identity(), noise.VPSchedule())

    def family(name: str, steps: int) -> sd.samplers.Sampler:
        sampler = getattr(sample, f"{name}Sampler")(denoiser, steps=steps, silent=True)
        return verify.Azula(sampler, declared=2 if name == "Heun" else None)

    names = ("DDPM", "DDIM", "Euler", "Heun", "Ito", "zAB", "vAB", "zEAB", "xEAB", "REAB", "PC")
    return {f"azula {name}": partial(family, name) for name in names}


def theirs(name: str, family: Callable[[int], sd.samplers.Sampler]) -> Row:
    """Certify a peer, or return the reason why it cannot be certified."""
    start = time.perf_counter()
    means = torch.tensor([MEAN, -0.4], dtype=torch.float64)
    # In two coordinates: an error of one may change its sign on the way, and look like none.
    data = sd.exact.Gaussian(sd.VP(), means, torch.tensor([VARIANCE, 1.5], dtype=torch.float64))
    try:
        made = verify.certificate(family, data)
    except verify.NotAffine as refusal:
        why, seconds = str(refusal), time.perf_counter() - start
        return Row(name, "its own", "refused", {}, False, why, "", why, seconds)
    return finished(name, made.process, "exact law", affine(made), made, str(made), start)


# ---- the files -----------------------------------------------------------------------------

COLUMNS = ("declared", "order", "local order", "limit", "W2", "mixture", "error / tolerance",
           "bias / standard error")  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """Return the table."""
    used = [column for column in COLUMNS if any(column in row.figures for row in rows)]
    lines = ["| " + " | ".join(["sampler", "process", "checked by", *used, "holds"]) + " |"]
    lines.append("| " + " | ".join(["---"] * (len(used) + 4)) + " |")
    for row in rows:
        holds = "yes" if row.holds else f"no: {row.known or row.verdict.split(';')[0]}"
        cells = [row.sampler, row.process, row.by, *(row.figures.get(c, "") for c in used), holds]
        lines.append("| " + " | ".join(cells) + " |")
    notes = (
        f"Data N({MEAN}, {VARIANCE}). order: fitted to W2 at 64, 128, 256 steps of the sampler's "
        "own grid (VE by Euler-Maruyama: 512, 1024, 2048). local order: the least over step ratios "
        "2, 1, 1/2. limit: W2 of the Richardson limit to the data. W2: at so many steps. mixture: "
        "RMS to the exact flow at 20 steps, three modes in the plane. Solvers with steps of their "
        "own are not affine: ODE solvers are held to the exact map (10 tolerances at 1e-5 and "
        "below), SDE solvers to 4.5 standard errors of 4,000 samples."
    )
    return "\n".join([*lines, "", notes, ""])


COLOURS = {True: "#9ecae1", False: "#fdae6b", "refused": "#d9d9d9"}


def picture(rows: list[Row], by_process: bool) -> Any:
    """Draw a line per sampler: its figure on each process; for peers its figures side by side."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    names = list(dict.fromkeys(row.sampler for row in rows))
    columns = (
        list(dict.fromkeys(row.process for row in rows)) if by_process else [*COLUMNS[:2], "W2"]
    )
    size = (1.8 + 1.05 * len(columns), 1.0 + 0.27 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for row in rows:
        y = names.index(row.sampler)
        colour = COLOURS["refused" if row.by == "refused" else row.holds]
        for x, column in enumerate(columns):
            if by_process and column != row.process:
                continue
            axis.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=colour))
            text = short(row) if by_process else row.figures.get(column, "")
            text = text or ("refused" if row.by == "refused" and x == 0 else "")
            axis.text(x, y, text, ha="center", va="center", fontsize=8)
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(names) - 0.5, -0.5))
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.tick_params(length=0)
    axis.xaxis.tick_top()
    axis.spines[:].set_visible(False)
    axis.set_xlabel("blue: every check holds; orange: one does not; grey: refused", fontsize=8)
    return figure


def short(row: Row) -> str:
    """Return a certificate in a few letters: its order, or its other figure."""
    if "order" in row.figures:
        return row.figures["order"]
    if "error / tolerance" in row.figures:
        return f"{row.figures['error / tolerance']} tol"
    return f"{row.figures['bias / standard error']} SE"


def chosen(names: tuple[str, ...], known: dict[str, Any], flag: str) -> list[str]:
    """Return the given names, or all if none is given."""
    return list(dict.fromkeys(words.match(flag, name, known) for name in names)) or list(known)


def rows_of(config: Config) -> Iterator[Row]:
    """Iterate over the certificates of the flags."""
    if config.peers:
        families = peers()
        for name in chosen(config.samplers, families, "--samplers"):
            yield theirs(name, families[name])
        return
    places = chosen(config.processes or tuple(PROCESSES), command.PROCESSES, "--processes")
    for name in chosen(config.samplers, SAMPLERS, "--samplers"):
        for place in places:
            yield ours(name, place)


def main(config: Config) -> None:
    if config.peers and config.processes:
        raise ValueError("--processes: with --peers each sampler has its own")
    command.check_out(config.out)
    rows: list[Row] = []
    for row in rows_of(config):
        rows.append(row)
        holds = "holds" if row.holds else (row.known or row.verdict)[:200]
        print(f"{row.sampler:32s} {row.process:12s} {row.seconds:5.1f} s  {holds}", flush=True)
    out = command.folder(config.out)
    print(f"\n{markdown(rows)}")
    storage.replace(out / "certificates.md", markdown(rows).encode())
    figures = json.dumps([asdict(row) for row in rows], indent=1)
    storage.replace(out / "certificates.json", f"{figures}\n".encode())
    storage.replace(out / "certificates.png", plots.png(picture(rows, not config.peers)))
    command.write_config(out, config)
    failing = sum(not row.holds and not row.known for row in rows)
    print(f"{len(rows) - failing} of {len(rows)} hold or fail for a known reason")
    print(f"-> {out / 'certificates.md'}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="(clip|k_diffusion|diffusers|jsonschema).*")
    command.run(main, Config)
