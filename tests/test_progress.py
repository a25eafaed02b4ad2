"""Progress bars: in place where a user looks on, and in a log file one line a minute."""

import io
import sys
from contextlib import redirect_stderr

import torch

import sde_diffusion as sd
from sde_diffusion import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written(run, stream=None):
    """Return what a run writes on stderr: redirected within a test, as pytest captures it too."""
    stream = stream or io.StringIO()
    with redirect_stderr(stream):
        run()
    return stream.getvalue()


def five_steps(**settings):
    for _ in progress.bar(range(5), desc="steps", **settings):
        pass


def test_a_log_file_gets_nothing_of_a_run_of_less_than_a_minute():
    assert written(five_steps) == ""


def test_a_log_file_gets_whole_lines_at_the_interval(monkeypatch):
    """With an interval of 0 each of the 5 steps is a line, the first state and the end are two."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    text = written(five_steps)
    lines = text.splitlines()
    assert "\r" not in text
    assert 6 <= len(lines) <= 7
    assert all(line.startswith("steps: ") for line in lines)
    assert "5/5" in lines[-1]


def test_a_terminal_gets_one_line_that_is_drawn_in_place():
    text = written(lambda: five_steps(mininterval=0), Terminal())
    assert text.count("\n") == 1
    assert text.count("\r") >= 5


def test_a_notebook_gets_a_bar_in_place(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # present in any notebook's process
    assert "\r" in written(five_steps)


def test_sample_shows_its_steps_by_the_same_bar(monkeypatch):
    model = sd.exact.Gaussian(sd.VP(), torch.zeros(2), 1.0)
    x = sd.prior(model, (3, 2), seeds=range(3))

    def run():
        made.append(sd.sample(model, sd.Heun(), x, steps=4, progress=True))

    made = []
    assert written(run) == ""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    assert "Heun: 100%" in written(run).splitlines()[-1]
    assert torch.equal(*made)
