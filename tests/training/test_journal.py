"""The table of a run survives a kill, and a signal is a flag read between two steps."""

import os
import signal
import threading

import pytest
import torch
from training_runs import POINTS, fresh

from sde_diffusion.training import Alone, Journal, Metrics, Stop, history, train


def steps(count, skipped=0):
    return [Metrics(k, 1 / k, k / 3, 1e-3, skipped) for k in range(1, count + 1)]


def test_the_table_comes_back_number_for_number(tmp_path):
    state = fresh()
    with Journal(tmp_path) as journal:
        made = []
        for metrics in train(state, POINTS):
            journal.write(metrics)
            made.append(metrics)
    assert history(tmp_path) == made
    assert len(made) == 12
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,loss,gradient_norm,learning_rate,skipped"


def test_a_journal_goes_on_where_the_run_stands(tmp_path):
    with Journal(tmp_path) as journal:
        for metrics in steps(7):
            journal.write(metrics)
    uninterrupted = (tmp_path / "metrics.csv").read_bytes()
    with Journal(tmp_path, step=4) as journal:
        assert history(tmp_path) == steps(4)
        for metrics in steps(7)[4:]:
            journal.write(metrics)
    assert (tmp_path / "metrics.csv").read_bytes() == uninterrupted


@pytest.mark.parametrize("cut", range(1, 60, 4))
def test_a_table_cut_anywhere_is_read_as_far_as_it_is_whole(tmp_path, cut):
    with Journal(tmp_path) as journal:
        for metrics in steps(5):
            journal.write(metrics)
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-cut])
    read = history(tmp_path)
    # A number that lost its last digits is still a number: only the last row may be such.
    assert read[:-1] == steps(5)[: max(0, len(read) - 1)]
    with Journal(tmp_path, step=3) as journal:
        for metrics in steps(5)[3:]:
            journal.write(metrics)
    assert history(tmp_path)[3:] == steps(5)[3:]


def test_a_table_with_a_gap_keeps_its_rows(tmp_path):
    """It was deleted on the way: what came after explains the rest of the run."""
    with Journal(tmp_path) as journal:
        for metrics in [*steps(2), *steps(6)[4:]]:
            journal.write(metrics)
    assert history(tmp_path) == [*steps(2), *steps(6)[4:]]
    with Journal(tmp_path, step=5):
        pass
    assert [metrics.step for metrics in history(tmp_path)] == [1, 2, 5]


def test_rows_out_of_order_and_noise_end_the_table(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [",".join(map(str, m)) for m in steps(4)]
    for bad in ("2,1,1,1,0", f'"{"x" * 200_000}"', "3,x,1,1,0", "3,1,1", "\0\xff,1,1,1,0"):
        path.write_bytes("\n".join(["step,...", *rows[:2], bad, rows[3], ""]).encode("latin1"))
        assert history(tmp_path) == steps(2)
    assert history(tmp_path / "absent") == []


def test_trackers_are_told_each_step(tmp_path):
    told = []
    with Journal(tmp_path, log=lambda values, step: told.append((step, values))) as journal:
        for metrics in steps(2):
            journal.write(metrics)
    assert [step for step, _ in told] == [1, 2]
    assert told[1][1] == {"loss": 0.5, "gradient_norm": 2 / 3, "learning_rate": 1e-3, "skipped": 0}


@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_the_second_has_its_usual_effect(which, code):
    before = signal.getsignal(which)
    with Stop() as stop:
        assert not stop.requested(Alone())
        os.kill(os.getpid(), which)
        assert stop.requested(Alone())
        assert stop.code == code
        assert signal.getsignal(which) == before
    assert signal.getsignal(which) == before


class Two:
    """Two processes, of which the other answers as it is told; a signal may come while it does."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, other=0.0, which=None):
        self.other, self.which = other, which

    def reduce(self, tensor, reduction):
        total = tensor + self.other
        if self.which is not None:
            os.kill(os.getpid(), self.which)
            self.which = None
        return total


def test_a_signal_that_comes_while_processes_agree_counts_at_the_next_question():
    with Stop() as stop:
        assert not stop.requested(Two(which=signal.SIGTERM))  # the other process received no
        assert stop.requested(Two())
        assert stop.code == 143


def test_a_signal_of_another_process_stops_this_one():
    with Stop() as stop:
        assert not stop.requested(Two())
        assert stop.code == 0
        assert stop.requested(Two(other=1.0))
        assert stop.code == 143


def test_handlers_are_as_before_where_nothing_happened():
    before = [signal.getsignal(which) for which in Stop.SIGNALS]
    with pytest.raises(RuntimeError, match="mine"), Stop():
        raise RuntimeError("mine")
    assert [signal.getsignal(which) for which in Stop.SIGNALS] == before


def test_outside_the_main_thread_nothing_is_caught():
    answers = []

    def work():
        with Stop() as stop:
            answers.append(stop.requested(Alone()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


def test_a_full_disk_ends_the_table_with_its_path(tmp_path):
    """RLIMIT_FSIZE lets no file grow beyond the limit."""
    resource = pytest.importorskip("resource")  # not on Windows
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    named = rf"File too large: '{tmp_path}/metrics\.csv'"
    journal = Journal(tmp_path)
    for metrics in steps(20):
        journal.write(metrics)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # Python ignores SIGXFSZ
    try:
        for end in (journal.flush, journal.__exit__):
            with pytest.raises(OSError, match=named):
                end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
