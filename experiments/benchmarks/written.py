"""Tables in Markdown and a picture of the benchmark."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import ends, laws
from benchmarks.overhead import Overhead

from sde_diffusion import plots

LIBRARIES = ("diffusers", "k-diffusion", "azula", "dpm-solver")
TOP = 5  # peers listed per column
GOAL = 1e-4  # the error at which adaptive solvers are compared


def theirs(solver: str) -> bool:
    return solver.startswith(LIBRARIES)


def markdown(found: Any) -> str:
    """Return all tables."""
    parts: list[str] = []
    if found.ends:
        parts.append(table_of_ends(ends.means(found.ends, len(found.problems))))
    if found.adaptive:
        parts.append(table_of_fronts(ends.means(found.adaptive, len(found.problems))))
    if found.laws:
        parts.append(table_of_laws(found.laws, found.draws))
    if found.overhead:
        parts.append(table_of_overheads(found.overhead, found.unet))
    if found.refusals:
        whom = len({(refusal.solver, refusal.setting) for refusal in found.refusals})
        parts.append(f"{whom} pairs of sampler and calls do not run; reasons: benchmark.json.\n")
    names = ", ".join(found.problems)
    return "\n".join([f"Problems: {names}.\n", *parts])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(mean: ends.Mean | None) -> str:
    return "" if mean is None else f"{mean.rms:.2g} ({mean.median:.1e})"


def table_of_ends(means: list[ends.Mean]) -> str:
    """Return ours by column, the best peer of each, and their ratio."""
    at = {(mean.solver, mean.setting): mean for mean in means}
    columns = sorted({mean.setting for mean in means})
    names = list(dict.fromkeys(mean.solver for mean in means))
    own = [name for name in names if not theirs(name)]
    rows = [[name, *(cell(at.get((name, c))) for c in columns)] for name in own]
    text = [
        "## Fixed steps: RMS (median) error of the end, by network calls\n",
        table(["solver", *(f"{c:g}" for c in columns)], rows),
    ]
    if len(own) < len(names):
        text.append("The best peers of each column, by RMS and then by median:\n")
        best: list[list[str]] = []
        for c in columns:
            there = [mean for mean in means if mean.setting == c and theirs(mean.solver)]
            ours = [mean for mean in means if mean.setting == c and not theirs(mean.solver)]
            for by, key in (("RMS", by_rms), ("median", by_median)):
                for place, mean in enumerate(sorted(there, key=key)[:TOP]):
                    share = "" if place or not ours else ratio(min(map(key, ours)), key(mean))
                    best.append([f"{c:g}", by, mean.solver, cell(mean), share])
        header = ["calls", "by", "peer", "RMS (median)", "our best / this"]
        text.append(table(header, best))
        pairs = sum(theirs(name) for name in names)
        text.append(f"{pairs} peers: samplers, each with every spacing.\n")
    text.append(
        "Geometric means over the problems of the RMS over samples, in brackets of the median. "
        "The data have standard deviation 1; the reference is DOP853 at 1e-10. A solver that "
        "begins below t = 1, as with the spacing `leading`, is given the exact flow's state there; "
        "one that stops above the data is compared with the data.\n"
    )
    return "\n".join(text)


def by_rms(mean: ends.Mean) -> float:
    return mean.rms


def by_median(mean: ends.Mean) -> float:
    return mean.median


def ratio(own: float, other: float) -> str:
    return f"{own / other:.2g}" if other else ""


def table_of_fronts(means: list[ends.Mean]) -> str:
    """Return the Pareto front of each adaptive solver, and the calls for an error of 1e-4."""
    rows: list[list[str]] = []
    reached: list[list[str]] = []
    for name in dict.fromkeys(mean.solver for mean in means):
        points = ends.front(mean for mean in means if mean.solver == name)
        for p in points:
            rows.append([name, f"{p.setting:g}", f"{p.calls:.1f}", str(p.slowest), cell(p)])
        good = [p for p in points if p.rms <= GOAL]
        least = [f"{good[0].calls:.1f}", str(good[0].slowest)] if good else ["not reached", ""]
        reached.append([name, *least])
    return "\n".join([
        "## Adaptive: calls and error\n",
        table(["solver", "tolerance", "mean calls", "slowest", "RMS (median)"], rows),
        f"Least mean calls for an RMS of at most {GOAL:g}:\n",
        table(["solver", "mean calls", "slowest"], reached),
        "Mean calls: network evaluations per sample, over the problems; slowest: the most batches "
        "of any problem. A solver with one step size for all has its mean as its slowest.\n",
    ])  # fmt: skip


def table_of_laws(found: list[laws.Distance], draws: int) -> str:
    """Return distances in units of their floors, geometric means over the problems."""
    columns = sorted({made.setting for made in found if made.setting >= 1})
    measures = list(found[0].distances)
    groups: dict[tuple[str, float], list[laws.Distance]] = {}
    for made in found:
        groups.setdefault((made.solver, made.setting), []).append(made)
    problems = len({made.problem for made in found})
    noisy = ends.geometric(s / m for made in found for m, s in made.floors.values())

    def cell(group: list[laws.Distance]) -> str:
        if len(group) < problems:
            return ""
        shares = [
            ends.geometric(made.distances[m] / made.floors[m][0] for made in group)
            for m in measures
        ]
        return " / ".join(f"{share:.2f}" for share in shares)

    rows = [
        [name, *(cell(groups.get((name, column), [])) for column in columns)]
        for name in dict.fromkeys(made.solver for made in found if made.setting >= 1)
    ]
    adaptive = [
        [name, f"{setting:g}", f"{sum(made.calls for made in group) / len(group):.1f}", cell(group)]
        for (name, setting), group in groups.items()
        if setting < 1
    ]
    return "\n".join([
        f"## Laws: {' / '.join(measures)} over its floor, by network calls\n",
        table(["solver", *(f"{column:g}" for column in columns)], rows),
        table(["solver", "tolerance", "mean calls", "the same"], adaptive) if adaptive else "",
        f"The floor is the mean distance of {draws} exact samples; about 1 is as good as exact. "
        f"{laws.FLOORS} batches of exact samples spread by {100 * noisy:.0f} %. "
        "Starts are drawn from the exact law of each sampler's first level.\n",
    ])  # fmt: skip


def table_of_overheads(found: list[Overhead], unet: list[Overhead]) -> str:
    """Return the time per call over that of a bare loop."""
    shapes = list(dict.fromkeys(made.shape for made in found))
    at = {(made.solver, made.shape): f"{made.ratio:.1f}" for made in found}
    whole = {made.solver: f"{made.ratio:.3f}" for made in unet}
    rows = [
        [name, *(at.get((name, shape), "") for shape in shapes), whole.get(name, "")]
        for name in dict.fromkeys(made.solver for made in found)
    ]
    units = ", ".join(
        f"{1e6 * next(m.seconds for m in found if m.shape == shape):.1f} µs at {shape}"
        for shape in shapes
    )
    real = (
        f"U-Net: the whole run over its network calls alone, {unet[0].seconds * 1e3:.0f} ms each "
        f"at {unet[0].shape}.\n"
        if unet
        else "\n"
    )
    header = ["solver", *map(str, shapes), "U-Net"]
    return "\n".join([
        "## Overhead: time per network call over a bare loop's\n",
        table(header, rows),
        f"The bare loop is a network of one multiplication and one fused in-place update: {units}. "
        + real,
    ])  # fmt: skip


# ---- the picture ---------------------------------------------------------------------------------


def picture(found: Any) -> Any:
    """Draw a panel for each measured part."""
    from matplotlib.figure import Figure

    panels = [
        (draw, part)
        for draw, part in (
            (draw_ends, found.ends), (draw_fronts, found.adaptive), (draw_laws, found.laws),
            (draw_overheads, found.overhead),
        )
        if part
    ]  # fmt: skip
    figure = Figure(figsize=(6.0 * max(len(panels), 1), 4.8), layout="constrained")
    for index, (draw, part) in enumerate(panels):
        draw(figure.add_subplot(1, len(panels), index + 1), part, len(found.problems))
    return figure


def draw_ends(axis: Any, found: list[ends.End], problems: int) -> None:
    means = ends.means(found, problems)
    for name in dict.fromkeys(mean.solver for mean in means):
        points = sorted((m.setting, m.rms) for m in means if m.solver == name)
        own = not theirs(name)
        style: dict[str, Any] = {"marker": "o", "label": name} if own else {"color": "0.85"}
        axis.plot(*zip(*points, strict=True), linewidth=1.4 if own else 0.5, zorder=2 + own,
                  markersize=3, **style)  # fmt: skip
    peer = [mean for mean in means if theirs(mean.solver)]
    columns = sorted({mean.setting for mean in peer})
    best = [min(m.rms for m in peer if m.setting == c) for c in columns]
    if best:
        axis.plot(columns, best, "k--", linewidth=1.4, label="best peer of the column", zorder=4)
    plots.log_scale(axis)
    axis.set(xlabel="network calls", ylabel="RMS error of the end",
             ylim=(None, 2))  # fmt: skip
    axis.legend(frameon=False, fontsize=8)


def draw_fronts(axis: Any, found: list[ends.End], problems: int) -> None:
    means = ends.means(found, problems)
    for name in dict.fromkeys(mean.solver for mean in means):
        points = ends.front(mean for mean in means if mean.solver == name)
        dashed = "--" if theirs(name) else "-"
        axis.plot([p.calls for p in points], [p.rms for p in points], f"o{dashed}", label=name,
                  markersize=3)  # fmt: skip
    plots.log_scale(axis)
    axis.set(xlabel="network calls per sample, mean",
             ylabel="RMS error of the end")  # fmt: skip
    axis.legend(frameon=False, fontsize=8)


def draw_laws(axis: Any, found: list[laws.Distance], problems: int) -> None:
    for name in dict.fromkeys(made.solver for made in found):
        own = [made for made in found if made.solver == name]
        settings = [[m for m in own if m.setting == s] for s in sorted({m.setting for m in own})]
        points = sorted(
            (
                sum(m.calls for m in some) / len(some),
                ends.geometric(m.ratio for m in some),
            )
            for some in settings
        )
        style: dict[str, Any] = {"color": "0.8"} if theirs(name) else {"marker": "o", "label": name}
        axis.plot(*zip(*points, strict=True), markersize=3, zorder=2 + (not theirs(name)), **style)
    axis.axhline(1.0, color="k", linestyle=":", linewidth=1)
    plots.log_scale(axis)
    axis.set(xlabel="network calls",
             ylabel="distance to the data's law / its floor")  # fmt: skip
    axis.legend(frameon=False, fontsize=8)


def draw_overheads(axis: Any, found: list[Overhead], problems: int) -> None:
    names = list(dict.fromkeys(made.solver for made in found))
    shapes = list(dict.fromkeys(made.shape for made in found))
    for index, shape in enumerate(shapes):
        own = [made for made in found if made.shape == shape]
        heights = [names.index(made.solver) + 0.35 * (index - 0.5) for made in own]
        axis.barh(heights, [made.ratio for made in own], height=0.33, label=str(shape))
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    plots.log_scale(axis, "x")
    axis.set(xlabel="time per call / bare loop")
    axis.legend(frameon=False, fontsize=8)
