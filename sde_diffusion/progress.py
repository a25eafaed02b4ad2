"""Progress bars: in place on a terminal and in a notebook, one line a minute in a log file."""

import re
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["bar"]

SECONDS = 60.0  # between the lines of a log


class Lines:
    """A text stream on which each state of a bar is a line of its own."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = re.sub(r"\x1b\[A|[\r\n]", "", text).rstrip()  # moves of the cursor
        if line:
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()


def bar(steps: Iterable[Any] | None = None, **settings: Any) -> Any:
    """Return tqdm's bar over `steps` on stderr, or one that `update` moves.

    If stderr is neither a terminal nor a notebook's, a run of less than a minute writes nothing and
    a longer one writes one line a minute.

    Args:
        settings: those of tqdm, such as total, desc and leave.
    """
    from tqdm import tqdm

    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm(steps, dynamic_ncols=True, **settings)
    rare = {"mininterval": SECONDS, "delay": SECONDS, "miniters": 1}
    return tqdm(steps, file=Lines(sys.stderr), **rare, **settings)
