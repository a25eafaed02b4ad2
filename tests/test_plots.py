"""A curve of losses can be read at any length."""

import pytest
from matplotlib.figure import Figure

from sde_diffusion import plots


@pytest.mark.parametrize(("count", "window"), [(1, 0), (9, 0), (10, 2), (50, 10), (200, 20),
                                               (1000, 20), (5000, 100)])  # fmt: skip
def test_the_running_mean_fits_the_run(count, window):
    """A mean over one step would be the curve itself; a single step would draw no line."""
    losses = [1 + (k % 2) for k in range(count)]
    axes = plots.loss_curve(Figure().subplots(), range(1, count + 1), losses)
    batch, *mean = axes.lines
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
    axes = plots.loss_curve(Figure().subplots(), range(len(losses)), losses)
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert low < min(losses) <= max(losses) < high
