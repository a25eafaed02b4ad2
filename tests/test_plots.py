"""Plots: nothing that is not finite is drawn, and ticks are plain numbers."""

import math

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import sde_diffusion as sd
from sde_diffusion import plots


def axes():
    figure = Figure(figsize=(6, 3.5))
    FigureCanvasAgg(figure)
    return figure.subplots()


def labels(axis):
    """Return value -> text of the labelled ticks that are seen."""
    axis.axes.figure.canvas.draw()
    low, high = axis.get_view_interval()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return {t.get_loc(): t.label1.get_text() for t in ticks
            if t.label1.get_text() and low <= t.get_loc() <= high}  # fmt: skip


@pytest.mark.parametrize(
    "ends", [(0.1431, 0.1439), (0.143436, 0.14344), (0.2, 0.9), (0.05, 3), (1e-5, 1), (3, 30),
             (1e-7, 3e-7), (900, 1100)]
)  # fmt: skip
def test_ticks_of_logarithmic_axes_are_plain_numbers_of_their_places(ends):
    axis = axes()
    axis.plot([0, 1], ends)
    shown = labels(plots.log_scale(axis, "y").yaxis)
    assert len(shown) >= 2
    assert len(set(shown.values())) == len(shown)
    for place, text in shown.items():
        assert float(text) == pytest.approx(place, rel=1e-7)
        assert len(text) <= 10


def test_a_symmetric_axis_shows_zero_and_both_signs():
    axis = axes()
    axis.plot([0, 1, 2], [-0.01, 1e-3, 0.1])
    shown = labels(plots.log_scale(axis, "y", linthresh=1e-3).yaxis)
    assert {"0", "-0.01", "0.1"} <= set(shown.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_and_not_drawn(bad):
    images, points = torch.zeros(3, 1, 2, 2), torch.zeros(4, 2)
    images[1, 0, 0, 0] = bad
    points[2, 1] = bad
    with pytest.raises(ValueError, match="x must be finite"):
        plots.tiles(images)
    with pytest.raises(ValueError, match="x must be finite"):
        plots.scatter(axes(), points)
    with pytest.raises(ValueError, match="states must be finite"):
        plots.paths(axes(), torch.zeros(4, 2), points[None])


def test_skipped_steps_leave_the_mean_of_the_losses_as_it_is():
    """A running mean over 20 of 100 losses of 1, one of them not finite."""
    axis = plots.loss_curve(axes(), range(1, 102), [1.0] * 40 + [math.nan] + [1.0] * 60)
    batch, mean = axis.lines
    assert len(batch.get_xdata()) == 100
    assert set(mean.get_ydata().tolist()) == {1.0}
    assert mean.get_xdata()[-1] == 101


def test_paths_begin_at_their_start_which_a_trajectory_leaves_out():
    model = sd.exact.Gaussian(sd.VP(), torch.zeros(2), 0.25)
    x = sd.prior(model, (5, 2), seeds=range(5))
    states = torch.stack([state.x for state in sd.trajectory(model, sd.Heun(), x, steps=3)])
    axis = plots.paths(axes(), x, states)
    first, last = axis.collections
    assert torch.equal(torch.tensor(first.get_offsets()).float(), x)
    assert torch.equal(torch.tensor(last.get_offsets()).float(), states[-1])
    assert [len(line.get_xdata()) for line in axis.lines] == [4] * 5
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["start", "end"]


@pytest.mark.parametrize(("count", "window"), [(1, 0), (9, 0), (10, 2), (50, 10), (200, 20),
                                               (1000, 20), (5000, 100)])  # fmt: skip
def test_the_running_mean_fits_the_run(count, window):
    """A mean over one step would be the curve itself; a single step would draw no line."""
    losses = [1 + (k % 2) for k in range(count)]
    axis = plots.loss_curve(axes(), range(1, count + 1), losses)
    batch, *mean = axis.lines
    assert (batch.get_marker() == ".") == (count < 20)
    assert len(mean) == (window > 0)
    if mean:
        assert mean[0].get_label() == f"mean of {window}"
        assert len(mean[0].get_xdata()) == count - window + 1
        assert mean[0].get_ydata() == pytest.approx(1.5)


@pytest.mark.parametrize(("losses", "scale"), [
    ([0.9, 0.14, 0.12], "linear"), ([0.9, 0.14, 0.09], "log"), ([0.5], "linear"),
    ([1.0, 0.0, -3.0], "linear"), ([100.0, 0.5], "log"),
])  # fmt: skip
def test_the_axis_is_logarithmic_where_it_has_round_labels(losses, scale):
    """Over less than a factor of 10 the labels are like 1.43436 x 10^-1, and 0 has no place."""
    axis = plots.loss_curve(axes(), range(len(losses)), losses)
    assert axis.get_yscale() == scale
    low, high = axis.get_ylim()
    assert low < min(losses) <= max(losses) < high
