"""What is measured: linear maps, and the equation that the methods solve with them."""

import math

import pytest
import torch
from torch.testing import assert_close

from sde_diffusion.inverse.least_squares import (
    Linearized,
    by_conjugate_gradients,
    by_singular_values,
)
from sde_diffusion.inverse.measurements import Measurement
from sde_diffusion.inverse.operators import Blur, Downsample, Gray, Mask, Matrix
from sde_diffusion.models.model import select


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
@pytest.mark.parametrize("rule", [by_singular_values, by_conjugate_gradients])
def test_least_squares_solve_what_they_say(rule, name, spread, ridge):
    """(spread A A^T + ridge I) z = r: A^T z and ridge z, against a dense solution."""
    operator, matrix, x = OPERATORS[name], dense(OPERATORS[name]), drawn(2, 3, 4, 6)
    r = operator(drawn(2, 3, 4, 6, seed=9)) - operator(x)
    pulled, rest = rule(Linearized(operator, x), spread, ridge)[0](r)
    whole = spread * matrix @ matrix.T + ridge * torch.eye(len(matrix), dtype=torch.float64)
    z = torch.linalg.lstsq(whole, r.flatten(1).T, driver="gelsd").solution
    # Blurs without a ridge are ill-conditioned: a rest of eps is an error of eps * condition.
    values = torch.linalg.eigvalsh(whole)
    condition = float(values.max() / values[values > 1e-10 * values.max()].min())
    bound = 1e-13 * condition * float(z.abs().max()) * len(matrix)
    assert_close(pulled.flatten(1), (matrix.T @ z).T, rtol=0, atol=bound)
    assert_close(rest.flatten(1).double(), ridge * z.T, rtol=0, atol=bound * (ridge + spread))


@pytest.mark.parametrize("rule", [by_singular_values, by_conjugate_gradients])
def test_what_nothing_explains_of_a_measurement_counts_for_nothing(rule):
    """Without a ridge: the pseudoinverse, for dependent rows and values that they cannot make."""
    matrix = drawn(5, 3, seed=1) @ drawn(3, 8, seed=2)  # rank 3 of 5 rows
    x, r = drawn(4, 8), drawn(4, 5, seed=3)
    d, _ = rule(Linearized(Matrix(matrix), x), 0.7, 0.0)[0](r)
    expected = r @ torch.linalg.pinv(matrix).T / 0.7
    values = torch.linalg.svdvals(matrix)[:3]
    bound = 1e-13 * float((values[0] / values[2]) ** 2 * expected.abs().max())
    assert_close(d, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
@pytest.mark.parametrize("noise_std", [0.0, 1e-3, 0.05])
def test_small_ill_conditioned_matrices_are_solved_too(size, noise_std):
    """Singular values from 1 to 1e-3: an error of eps times the condition, in float32 of eps."""
    m, d = size
    u, v = (torch.linalg.qr(drawn(n, n, seed=n))[0] for n in size)
    w = torch.logspace(0, -3, m, dtype=torch.float64)
    matrix = u * w @ v[:, :m].T
    x, y = drawn(4, d), drawn(4, m, seed=5) @ (u * w).T
    expected = (y - x @ matrix.T) @ u * (w / (0.7 * w**2 + noise_std**2)) @ v[:, :m].T
    made, _ = Measurement(Matrix(matrix), noise_std, y).solve(x, 0.7, noise_std**2)
    assert_close(made, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def test_a_mask_hears_nothing_of_hidden_pixels_and_rows_take_their_masks_with_them():
    mask = torch.zeros(3, 1, 4, 6, dtype=torch.float64)
    for k in range(3):
        mask[k, :, k] = 1
    image, x = drawn(3, 1, 4, 6, seed=1), drawn(3, 1, 4, 6, seed=2)
    for noise_std in (0.0, 0.1):
        whole, seen = (Measurement(Mask(mask), noise_std, y) for y in (image, mask * image))
        assert torch.equal(whole.cost(x), seen.cost(x))
        for ours, theirs in zip(whole.solve(x, 0.3, 0.01), seen.solve(x, 0.3, 0.01), strict=True):
            assert torch.equal(ours, theirs)
        index = torch.tensor([2, 0])
        assert torch.equal(select(whole, index, 4).cost(x[index]), whole.cost(x)[index])
    # one mask for all, over three channels: it is the same for any rows
    shared = Measurement(Mask(torch.tensor([1.0, 0, 1]).reshape(3, 1, 1)), 0.1, drawn(2, 3, 4, 6))
    assert select(shared, torch.tensor([1]), 4).operator is shared.operator


def test_levels_of_each_sample_give_each_its_own_equation():
    operator, x = OPERATORS["matrix"], drawn(3, 3, 4, 6)
    measurement = Measurement(operator, 0.1, drawn(3, 7, seed=2))
    spread = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)
    together = measurement.solve(x, spread.reshape(3, 1, 1, 1), 0.2)
    for k in range(3):
        index = torch.tensor([k])
        alone = select(measurement, index, x.ndim).solve(x[index], float(spread[k]), 0.2)
        for ours, theirs in zip(together, alone, strict=True):
            assert_close(ours[index], theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: Mask(torch.zeros(2, 2)), "nothing is known"),
    (lambda: Mask(torch.ones(2, 2)), "nothing is left"),
    (lambda: Mask(torch.full((2, 2), 0.5)), "0 and 1 only"),
    (lambda: Mask(torch.tensor([math.nan, 1.0])), "0 and 1 only"),
    (lambda: Mask([0, 1]), "tensor of 0 and 1"),
    (lambda: Downsample(0), "factor"),
    (lambda: Downsample(3)(drawn(1, 3, 4, 6)), "divisible by 3"),
    (lambda: Blur(0.0), "std"),
    (lambda: Blur(1.0)(drawn(1, 4, 6)), r"\(B, C, H, W\)"),
    (lambda: Gray()(drawn(1, 1, 4, 6)), "3 channels"),
    (lambda: Mask(torch.eye(5))(drawn(2, 1, 8, 8)), r"mask must broadcast against the images"),
    (lambda: Mask(torch.eye(4).repeat(3, 1, 1, 1))(drawn(1, 1, 4, 4)), "mask must broadcast"),
    (lambda: Matrix(drawn(3, 5))(drawn(2, 4)), r"matrix must be \(m, 4\)"),
    (lambda: Measurement(torch.round, 0.1, drawn(2, 4)).solve(drawn(2, 4), 1.0, 0.1),
     "differentiable"),
    (lambda: Measurement(lambda x: (x > 0).double(), 0.1, drawn(2, 4)).solve(drawn(2, 4), 1.0, 0.1),
     "differentiable"),
    (lambda: Measurement(lambda x: x / 0, 0.1, drawn(2, 4)).solve(drawn(2, 4), 1.0, 0.1),
     "finite derivative"),
    (lambda: Measurement(lambda x: x[:1], 0.1, drawn(1, 4)).solve(drawn(2, 4), 1.0, 0.1),
     "one entry for each of 2"),
    (lambda: Matrix(drawn(3)), r"\(m, d\)"),
    (lambda: Matrix(drawn(3, 2) * math.nan), "finite"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()
