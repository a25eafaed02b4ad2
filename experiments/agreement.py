"""Distances between DDPM chains and the SDE that is their limit, with rates in N.

    python experiments/agreement.py --process vp --rule euler

Nothing is estimated: data are Gaussian, every law is exact.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from common import flags


@dataclass(frozen=True)
class Config:
    """Print the table; write agreement.txt, agreement.json and agreement.png."""

    process: flags.ProcessName = "vp"
    rule: Literal["euler", "exact", "table"] = "euler"
    """euler: beta(i/N)/N; exact: the SDE's marginals; table: the published chain of ou or cosine"""
    sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    """lengths N of the chains"""
    variance: Literal["beta", "posterior"] = "beta"
    """variance of the ancestral sampler, whose law is compared with the reverse SDE's"""
    data_mean: float = 1.0
    """mean of the data"""
    data_variance: float = 0.25
    """variance of the data"""
    out: Path = Path("runs/agreement")
    """folder of everything written"""


if __name__ == "__main__":
    flags.check(Config)

import json
from functools import partial

from common import command, words

import sde_diffusion as sd
from sde_diffusion import plots, validate
from sde_diffusion.files import storage

PROCESSES = command.PROCESSES | {"ou": sd.OU(1.0)}  # the rate of Discrete.constant
TABLES = {"ou": sd.Discrete.constant, "cosine": sd.Discrete.cosine}


def main(config: Config) -> None:
    if len(config.sizes) < 2 or len(set(config.sizes)) < len(config.sizes):
        raise ValueError(f"--sizes needs two or more different lengths; got {config.sizes}")
    for size in config.sizes:
        validate.integer("--sizes", size, at_least=2, at_most=10_000)
    validate.number("--data-mean", config.data_mean)
    validate.number("--data-variance", config.data_variance, 0, strict=True)
    words.match("--process", config.process, PROCESSES)
    command.check_out(config.out)
    process = PROCESSES[config.process]
    if config.rule == "table":
        if config.process not in TABLES:
            raise ValueError(
                f"--rule table: {config.process} has none; there are: {', '.join(TABLES)}"
            )
        family = TABLES[config.process]
    else:
        family = partial(sd.processes.discretize, process, rule=config.rule)
    report = sd.verify.agreement(
        process,
        family,
        sizes=config.sizes,
        mean=config.data_mean,
        variance=config.data_variance,
        sampler=sd.Ancestral(config.variance),
    )
    print(report)
    out = command.folder(config.out)
    storage.replace(out / "agreement.txt", f"{report}\n".encode())
    figures = json.dumps({**asdict(report), "rates": report.rates}, indent=1)
    storage.replace(out / "agreement.json", f"{figures}\n".encode())
    storage.replace(out / "agreement.png", plots.png(picture(report)))
    command.write_config(out, config)
    print(f"-> {out / 'agreement.png'}")


def picture(report: sd.verify.Agreement) -> object:
    """Draw each distance above rounding against N, in logarithms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axis = figure.subplots()
    for marker, (name, rate) in zip("os^D", report.rates.items(), strict=True):
        if rate is not None:
            label = f"{name}: N^{-rate:.2f}"
            axis.plot(report.sizes, getattr(report, name), marker=marker, label=label)
    axis.set(xlabel="length of the chain N (steps)", ylabel="distance")
    plots.log_scale(axis)
    axis.set_xticks(report.sizes, [str(size) for size in report.sizes])
    axis.xaxis.minorticks_off()
    axis.legend()
    return figure


if __name__ == "__main__":
    command.run(main, Config)
