"""The table of the steps of a run, and the signals that stop it."""

import os
import signal
import threading
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from sde_diffusion import validate
from sde_diffusion.files import storage
from sde_diffusion.training.engine import Engine
from sde_diffusion.training.state import Metrics

__all__ = ["Journal", "Stop", "history"]

TABLE = "metrics.csv"


class Journal:
    """Table of the steps, metrics.csv, that survives a kill, and accelerate's trackers.

        with Journal(folder, state.step) as journal:
            for metrics in train(state, data):
                journal.write(metrics)

    Args:
        folder: folder of the table.
        step: steps done; later rows are removed, since their steps will be repeated.
        log: called with (values by name, step=step), such as `accelerator.log`; None by default.
    """

    def __init__(self, folder: str | Path, step: int = 0, log: Any = None) -> None:
        self.log = log
        validate.integer("step", step, 0)
        done = [metrics for metrics in history(folder) if metrics.step <= step]
        path = Path(folder, TABLE)
        storage.replace(path, "".join(map(line, [Metrics._fields, *done])).encode())
        self._path = path
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        with storage.naming(self._path):
            self._file.close()

    def write(self, metrics: Metrics) -> None:
        """Append a step."""
        with storage.naming(self._path):
            self._file.write(line(metrics))
        if self.log is not None:
            self.log({k: v for k, v in metrics._asdict().items() if k != "step"}, step=metrics.step)

    def flush(self) -> None:
        """Write all rows to the disk; call it before a checkpoint."""
        with storage.naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())


def history(folder: str | Path) -> list[Metrics]:
    """Read the steps of metrics.csv in `folder` up to the first row damaged or out of order."""
    path = Path(folder, TABLE)
    steps: list[Metrics] = []
    with suppress(ValueError, FileNotFoundError):  # a kill may have cut the last row
        for row in path.read_text("utf-8", errors="replace").splitlines()[1:]:
            step, loss, norm, rate, skipped = row.split(",")
            read = Metrics(int(step), float(loss), float(norm), float(rate), int(skipped))
            if read.step <= (steps[-1].step if steps else 0):
                break
            steps.append(read)
    return steps


def line(row: Iterable[object]) -> str:
    """Return a row of the table."""
    return ",".join(map(str, row)) + "\n"


class Stop:
    """SIGINT and SIGTERM as a flag that a loop reads between two steps.

        with Stop() as stop:
            for metrics in train(state, data):
                if stop.requested(state.engine):
                    save(state, folder)
                    sys.exit(stop.code)

    The second signal has its usual effect. Outside the main thread no signal is caught.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal = 0
        self.code = 0  # exit status after a signal: 130 for Ctrl-C, 143 for SIGTERM
        self._handlers = ExitStack()  # puts back those of before, once

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for which in self.SIGNALS:
                self._handlers.callback(signal.signal, which, signal.signal(which, self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def _note(self, which: int, frame: object) -> None:
        self.signal = which
        self._handlers.close()

    def requested(self, engine: Engine) -> bool:
        """True if any process got a signal; a call of all processes, with one result."""
        noted = self.signal
        if engine.num_processes > 1:
            # A signal during this reduction counts at the next call, for all processes.
            mine = torch.tensor(float(noted > 0), device=engine.device)
            noted = (noted or self.SIGNALS[1]) if engine.reduce(mine, "sum") > 0 else 0
        self.code = 128 + noted if noted else 0
        return bool(noted)
