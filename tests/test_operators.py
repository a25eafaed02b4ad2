"""What is measured: linear maps, and the equation that the methods solve with them."""

import math

import pytest
import torch
from torch.testing import assert_close

from sde_diffusion.inverse import Measurement
from sde_diffusion.operators import Blur, Downsample, Gray, Mask, Matrix


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = (drawn(1, 3, 4, 6, seed=5) > 0).double()
OPERATORS = {
    "mask": Mask(MASK),
    "downsample": Downsample(2),
    "blur": Blur(0.8),
    "gray": Gray(),
    "matrix": Matrix(drawn(7, 72, seed=3)),
}


def dense(operator):
    """A, (m, d), from what it makes of each unit vector."""
    return operator(torch.eye(72, dtype=torch.float64).reshape(72, 3, 4, 6)).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_they_are_linear_and_row_by_row(name):
    operator, x, z = OPERATORS[name], drawn(2, 3, 4, 6), drawn(2, 3, 4, 6, seed=1)
    assert_close(operator(2 * x - z), 2 * operator(x) - operator(z), rtol=0, atol=1e-13)
    assert_close(operator(x)[1:], operator(x[1:]), rtol=0, atol=1e-14)
    assert_close(operator(x).flatten(1), x.flatten(1) @ dense(operator).T, rtol=0, atol=1e-13)
    assert operator(x.float()).dtype == torch.float32


def test_each_does_what_it_says():
    x = drawn(2, 3, 4, 6)
    assert torch.equal(Mask(MASK)(x), torch.where(MASK == 1, x, 0.0))
    square = x[:, :, 2:4, 4:6].mean((2, 3))
    assert_close(Downsample(2)(x)[:, :, 1, 2], square, rtol=0, atol=1e-15)
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    assert_close(Gray()(x)[:, 0], luma, rtol=0, atol=1e-15)
    flat = torch.full((1, 2, 5, 5), 0.7, dtype=torch.float64)
    assert_close(Blur(1.5)(flat), flat, rtol=0, atol=1e-14)  # keeps what is constant
    point = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    point[..., 10, 10] = 1
    seen, places = Blur(1.2)(point)[0, 0], torch.arange(21, dtype=torch.float64) - 10
    variance = float((seen * places[:, None] ** 2).sum())
    line = torch.exp(-(places[6:15] ** 2) / (2 * 1.2**2))  # cut at 4 pixels, 3 std and up
    assert_close(variance, float((line * places[6:15] ** 2).sum() / line.sum()))


@pytest.mark.parametrize(("spread", "ridge"), [(1.0, 0.5), (0.3, 1e-3), (2.0, 0.0)])
@pytest.mark.parametrize("name", OPERATORS)
def test_conjugate_gradients_solve_what_they_say(name, spread, ridge):
    """(spread A A^T + ridge I) z = r, and A^T z, against a dense solution."""
    operator, matrix, x = OPERATORS[name], dense(OPERATORS[name]), drawn(2, 3, 4, 6)
    y = operator(drawn(2, 3, 4, 6, seed=9))
    r, _, pulled = Measurement(operator, 0.1, y).solve(x, spread, ridge)
    assert_close(r, y - operator(x))
    whole = spread * matrix @ matrix.T + ridge * torch.eye(len(matrix), dtype=torch.float64)
    z = torch.linalg.lstsq(whole, r.flatten(1).T, driver="gelsd").solution
    # Blurs without a ridge are ill-conditioned: a rest of eps is an error of eps * condition.
    values = torch.linalg.eigvalsh(whole)
    condition = float(values.max() / values[values > 1e-10 * values.max()].min())
    bound = 1e-13 * condition * float(z.abs().max()) * len(matrix)
    assert_close(pulled.flatten(1), (matrix.T @ z).T, rtol=0, atol=bound)


def test_levels_of_each_sample_give_each_its_own_equation():
    operator, x = OPERATORS["matrix"], drawn(3, 3, 4, 6)
    measurement = Measurement(operator, 0.1, drawn(3, 7, seed=2))
    spread = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)
    together = measurement.solve(x, spread.reshape(3, 1, 1, 1), 0.2)
    for k in range(3):
        index = torch.tensor([k])
        alone = measurement.rows(index).solve(x[index], float(spread[k]), 0.2)
        for ours, theirs in zip(together, alone, strict=True):
            assert_close(ours[index], theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: Mask(torch.zeros(2, 2)), "nothing is known"),
    (lambda: Mask(torch.ones(2, 2)), "nothing is left"),
    (lambda: Mask(torch.full((2, 2), 0.5)), "nothing but 0 and 1"),
    (lambda: Mask(torch.tensor([math.nan, 1.0])), "nothing but 0 and 1"),
    (lambda: Mask([0, 1]), "tensor of 0 and 1"),
    (lambda: Downsample(0), "factor"),
    (lambda: Downsample(3)(drawn(1, 3, 4, 6)), "divisible by 3"),
    (lambda: Blur(0.0), "std"),
    (lambda: Blur(1.0)(drawn(1, 4, 6)), r"\(B, C, H, W\)"),
    (lambda: Gray()(drawn(1, 1, 4, 6)), "3 channels"),
    (lambda: Matrix(drawn(3)), r"\(m, d\)"),
    (lambda: Matrix(drawn(3, 2) * math.nan), "finite"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()
