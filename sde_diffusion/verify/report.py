"""Reports: each result of `verify` prints as a title, facts, a table, a verdict and its limits."""

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

WIDTH = 88  # of a line of text, as on the pages of the documentation
CELL = 10  # least width of a column


class Table(NamedTuple):
    """A table of numbers.

    Attributes:
        columns: name -> how its numbers are formatted.
        rows: one value per column; None leaves a cell empty.
    """

    columns: dict[str, str]
    rows: Iterable[Sequence[float | str | None]]

    def lines(self) -> Iterator[str]:
        """The table as text, a line per row, columns aligned to the right."""
        texts = [list(self.columns)]
        for row in self.rows:
            cells = zip(row, self.columns.values(), strict=True)
            texts.append(["" if value is None else format(value, form) for value, form in cells])
        widths = [max(CELL, *map(len, column)) for column in zip(*texts, strict=True)]
        for text in texts:
            yield "  ".join(cell.rjust(n) for cell, n in zip(text, widths, strict=True)).rstrip()


class Page(NamedTuple):
    """The content of a report, all but its verdict.

    Attributes:
        title: the sampler and the check, in one line.
        unproven: the object of "does not prove".
        table: the numbers behind the verdict.
        facts: further lines, above the table.
    """

    title: str
    unproven: str
    table: Table = Table({}, ())
    facts: Sequence[str] = ()


class Report(ABC):
    """Base of all results: printed as a page and a verdict."""

    @property
    @abstractmethod
    def verdict(self) -> str:
        """The outcome in one sentence; failures in capitals."""

    @abstractmethod
    def page(self) -> Page:
        """The content of the report, all but its verdict."""

    def __str__(self) -> str:
        title, unproven, table, facts = self.page()
        lines = [f"  {line}" for line in (*facts, *table.lines()) if line]
        closing = (f"verdict: {self.verdict}", f"does not prove: {unproven}")
        return "\n".join([title, *lines, *map(wrapped, closing)])

    def __repr__(self) -> str:
        return str(self)


def wrapped(text: str) -> str:
    """A paragraph, indented, its further lines by more."""
    return textwrap.fill(
        text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def moments(mean: Tensor, covariance: Tensor) -> str:
    """A law in one line."""
    return f"mean {listed_numbers(mean)}, variance {listed_numbers(covariance.diagonal())}"


def listed_numbers(values: Tensor) -> str:
    """A few numbers in one line; of many, the first four."""
    shown = " ".join(f"{value:.8g}" for value in values.flatten()[:4].tolist())
    return shown if values.numel() <= 4 else f"{shown} ... ({values.numel()} in all)"


def thinned(n: int, most: int) -> list[int]:
    """At most so many of the indices 0 .. n - 1, evenly spread, the ends among them."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()
