"""JSON values are held to the annotations of constructors, with or without rules in them."""

from collections.abc import Sequence
from typing import Annotated, Literal

import pytest

from sde_diffusion.files.describe import matches_type
from sde_diffusion.validate import Count, Each, Integer, Positive

Widths = Annotated[Sequence[int], Each(Integer(1), 4)]
FITS = [
    (3, Count), (3, Count | None), (None, Count | None), (2, Positive), (2.5, Positive | None),
    ([1, 2], Widths), ([], Widths | None), (None, Widths | None), ("a", Literal["a"] | None),
    ([1.0, 2], tuple[float, ...]), ([1, 2], tuple[int, int]),
]  # fmt: skip
WRONG = [
    (True, Count), (1.0, Count), ("1", Count | None), (None, Count), (None, Widths), (2**63, Count),
    (True, Positive), ("x", Positive | None), ([True], Widths), ([1.0], Widths | None),
    ("ab", Widths), ({"a": 1}, Widths), ("b", Literal["a"] | None), ([1], tuple[int, int]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "hint"), FITS, ids=str)
def test_a_value_of_the_annotated_type_is_taken(value, hint):
    assert matches_type(value, hint)


@pytest.mark.parametrize(("value", "hint"), WRONG, ids=str)
def test_a_value_of_another_type_is_refused(value, hint):
    assert not matches_type(value, hint)
