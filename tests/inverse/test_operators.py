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
from sde_diffusion.inverse.operators import (
    Bicubic,
    Blur,
    CircularConvolution,
    Convolution,
    Downsample,
    FourierTransform,
    Gray,
    Mask,
    Matrix,
    PhaseRetrieval,
    Radon,
)
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
    "convolution": Convolution(drawn(3, 4, seed=6)),
    "circular": CircularConvolution(drawn(3, 4, seed=6)),
    "radon": Radon(torch.tensor([0.0, 0.4, 1.7, 3.0])),
    "bicubic": Bicubic(2),
    "composition": Mask(MASK[:, :1, :2, :3]) @ Downsample(2) @ CircularConvolution(drawn(2, 2)),
}
FREQUENCIES = (drawn(4, 6, seed=11) > 0).double()


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


@pytest.mark.parametrize("name", [*OPERATORS, "fourier"])
def test_back_propagation_is_the_adjoint(name):
    """<A x, y> = <x, A^T y>, for complex y the real part of the product."""
    given = Measurement(OPERATORS.get(name, FourierTransform(FREQUENCIES)), 0.0, drawn(1, 1))
    at = Linearized(given, drawn(2, 3, 4, 6))
    x, y = drawn(2, 3, 4, 6, seed=1), drawn(*at.seen.shape, seed=2)
    forth, back = (given(x) * y).sum(), (x * at.transposed(y)).sum()
    assert_close(forth, back, rtol=0, atol=1e-13 * float(x.norm() * at.transposed(y).norm()))
    assert_close(at.applied(x), given(x), rtol=0, atol=1e-12)


def test_convolutions_are_their_sums():
    """y[i] = sum_k kernel[k] x0[i + center - k], with replicated and with periodic borders."""
    for h, w in ((3, 4), (2, 3), (1, 1), (4, 5)):
        kernel, x = drawn(h, w, seed=6), drawn(1, 1, 4, 6)
        rows, columns = torch.arange(4)[:, None, None, None], torch.arange(6)[:, None, None]
        places = (rows + h // 2 - torch.arange(h)[:, None], columns + w // 2 - torch.arange(w))
        held, turned = (
            [f(place, n) for place, n in zip(places, (4, 6), strict=True)]
            for f in (lambda k, n: k.clamp(0, n - 1), lambda k, n: k % n)
        )
        for operator, (i, j) in ((Convolution, held), (CircularConvolution, turned)):
            expected = (kernel * x[0, 0][i, j]).sum((2, 3))
            assert_close(operator(kernel)(x)[0, 0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_a_circular_convolution_is_solved_in_closed_form(ridge):
    """As by singular values, also where the kernel removes frequencies, for levels per sample."""
    x, spread = drawn(2, 1, 4, 6), torch.tensor([0.3, 2.0]).double()[:, None, None, None]
    for kernel in (drawn(3, 4, seed=6), torch.tensor([[0.5, 0.5]]).double()):
        given = Measurement(CircularConvolution(kernel), 0.1, drawn(2, 1, 4, 6, seed=1))
        wanted = by_singular_values(Linearized(given, x), spread, ridge)[0](given.residual(x))
        for ours, theirs in zip(given.solve(x, spread, ridge), wanted, strict=True):
            assert_close(ours, theirs, rtol=0, atol=1e-11 * float(theirs.abs().max() + 1))


def test_the_fourier_transform_is_unitary_where_it_is_measured():
    x, mask = drawn(2, 3, 4, 6), FREQUENCIES
    whole = FourierTransform()(x)
    assert_close(whole.abs().square().sum(), x.square().sum())
    i, j = torch.arange(4).double(), torch.arange(6).double()
    wave = torch.exp(-2j * math.pi * (2 * i[:, None] / 4 + 5 * j / 6)) / math.sqrt(24)
    assert_close(whole[:, :, 2, 5], (x * wave).sum((2, 3)), rtol=0, atol=1e-14)
    assert_close(FourierTransform(mask)(x), torch.where(mask == 1, whole, 0))
    assert_close(PhaseRetrieval(1)(x), whole.abs())
    assert_close(PhaseRetrieval(2)(x).square().sum(), x.square().sum())


def test_a_radon_transform_keeps_the_moments():
    """Each projection has the sum of the image, and its mean is the projected mean (Ludwig 1966);
    those at 0 and 90 degrees are the sums of columns and rows."""
    x, angles = drawn(2, 3, 4, 6), torch.tensor([0, math.pi / 2, 0.3, 2.5, 5], dtype=torch.float64)
    seen = Radon(angles)(x)
    n = seen.shape[3]
    assert_close(seen.sum(3), x.sum((2, 3))[:, :, None].expand(2, 3, 5), rtol=0, atol=1e-13)
    u, v = torch.arange(6).double() - 2.5, torch.arange(4).double() - 1.5
    first = (x.sum(2) @ u)[..., None] * angles.cos() + (x.sum(3) @ v)[..., None] * angles.sin()
    places = torch.arange(n).double() - (n - 1) / 2
    assert_close(seen @ places, first, rtol=0, atol=1e-12)
    assert_close(seen[:, :, 0, n // 2 - 3 : n // 2 + 3], x.sum(2), rtol=0, atol=1e-13)
    assert_close(seen[:, :, 1, n // 2 - 2 : n // 2 + 2], x.sum(3), rtol=0, atol=1e-13)


def test_bicubic_weights_are_those_of_keys():
    """Weights k((i - c) / 2), normalized, with c the center of two pixels and Keys' a = -1/2."""
    x = drawn(1, 1, 16, 16)
    off = (torch.arange(16).double() + 0.5 - 2 * (torch.arange(8).double()[:, None] + 0.5)) / 2
    z = off.abs()
    near, far = 1.5 * z**3 - 2.5 * z**2 + 1, -0.5 * z**3 + 2.5 * z**2 - 4 * z + 2
    weight = torch.where(z < 1, near, torch.where(z < 2, far, 0))
    weight = weight / weight.sum(1, keepdim=True)
    assert_close(Bicubic(2)(x)[0, 0], weight @ x[0, 0] @ weight.T, rtol=0, atol=1e-6)


def test_a_composition_is_one_map_after_the_other():
    x, blur, mask = drawn(2, 3, 4, 6), Blur(0.8), Mask(MASK)
    assert torch.equal((mask @ blur)(x), mask(blur(x)))
    assert torch.equal((torch.tanh @ blur)(x), torch.tanh(blur(x)))
    assert torch.equal((blur @ torch.tanh @ mask)(x), blur(torch.tanh(mask(x))))
    y = torch.where(MASK == 1, blur(x), math.nan)
    given = Measurement(mask @ blur, 0.1, y)  # what the outer one leaves out may be unknown
    assert_close(given.residual(x), torch.zeros_like(x), rtol=0, atol=1e-14)
    each = Measurement(Mask(MASK.expand(2, 3, 4, 6).clone()) @ blur, 0.1, y)
    assert select(each, torch.tensor([1]), 4).operator.outer.mask.shape == (1, 3, 4, 6)


@pytest.mark.parametrize("operator", [Mask(MASK), FourierTransform(FREQUENCIES)])
def test_unknown_parts_of_y_may_be_nan(operator):
    x = drawn(2, 3, 4, 6)
    y = operator(drawn(2, 3, 4, 6, seed=1))
    holes = torch.where(operator(torch.ones_like(x)).abs() * 0 + operator.mask == 1, y, math.nan)
    full, part = Measurement(operator, 0.3, y), Measurement(operator, 0.3, holes)
    assert torch.equal(full.cost(x), part.cost(x))
    assert torch.equal(full.log_likelihood(x), part.log_likelihood(x))
    for ours, theirs in zip(full.solve(x, 0.3, 0.01), part.solve(x, 0.3, 0.01), strict=True):
        assert torch.equal(ours, theirs)
    part.after_run(drawn(2, 3, 4, 6, seed=1))
    with pytest.raises(ValueError, match="y must be finite"):
        Measurement(operator, 0.3, torch.full_like(y, math.nan))


def test_a_complex_measurement_is_one_of_real_and_imaginary_parts():
    """y = F x + 0.3 (e + i e'): likelihood and solution by the real matrix of both parts."""
    x, noise = drawn(2, 3, 4, 6), 0.3
    basis = torch.eye(72).double().reshape(72, 3, 4, 6)
    matrix = torch.view_as_real(FourierTransform(FREQUENCIES)(basis)).flatten(1).T
    y = torch.complex(drawn(2, 3, 4, 6, seed=1), drawn(2, 3, 4, 6, seed=2))
    given = Measurement(FourierTransform(FREQUENCIES), noise, y)
    r = torch.view_as_real(torch.where(FREQUENCIES == 1, y, 0)).flatten(1) - x.flatten(1) @ matrix.T
    assert_close(given.log_likelihood(x), -r.square().sum(1) / (2 * noise**2))
    whole = 0.4 * matrix @ matrix.T + noise**2 * torch.eye(144).double()
    expected = torch.linalg.solve(whole, r.T).T @ matrix
    assert_close(given.solve(x, 0.4, noise**2)[0].flatten(1), expected, rtol=0, atol=1e-11)
    single = Measurement(FourierTransform(FREQUENCIES), noise, y.to(torch.complex64))
    assert single.solve(x.float(), 0.4, noise**2)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "spread", [0.4, torch.tensor([0.1, 1.0, 4.0]).double()[:, None, None, None]]
)
def test_noise_of_each_sample_is_its_own(spread):
    x, noise, y = drawn(3, 3, 4, 6), torch.tensor([0.0, 0.1, 2.0]).double(), drawn(3, 7, seed=2)
    each = Measurement(OPERATORS["matrix"], noise, y)
    for k, std in enumerate(noise.tolist()):
        row, own = torch.tensor([k]), spread if isinstance(spread, float) else spread[k : k + 1]
        alone = Measurement(OPERATORS["matrix"], std, y[row])
        parts = select(each, row, 4)
        assert parts.noise_std.tolist() == [std]
        for made in (each.spread_likelihood(x, spread), parts.spread_likelihood(x[row], own)):
            for ours, theirs in zip(made, alone.spread_likelihood(x[row], own), strict=True):
                ours = ours[row] if len(ours) == 3 else ours
                assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
        if std:
            positive = Measurement(OPERATORS["matrix"], noise + (noise == 0), y)
            assert_close(positive.log_likelihood(x)[row], alone.log_likelihood(x[row]))


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
    (lambda: CircularConvolution(drawn(5, 5))(drawn(1, 1, 4, 4)), "kernel must fit into images"),
    (lambda: Convolution(drawn(5)), "matrix"),
    (lambda: Bicubic(3)(drawn(1, 1, 4, 6)), "divisible by 3"),
    (lambda: Radon(drawn(2) * math.inf), "finite"),
    (lambda: Mask(MASK) @ 3, "inner must be a function"),
    (lambda: Measurement(FourierTransform(), 0.1, drawn(2, 1, 4, 4)).residual(drawn(2, 1, 4, 4)),
     "y must be complex, as operator"),
    (lambda: Measurement(Gray(), 0.1, drawn(2, 1, 4, 4) * 1j).residual(drawn(2, 3, 4, 4)),
     "y must be real, as operator"),
    (lambda: Measurement(Gray(), torch.tensor([0.1, -1.0]), drawn(2, 1, 4, 4)), "noise_std"),
    (lambda: Measurement(Gray(), torch.ones(2, 2), drawn(2, 1, 4, 4)), "noise_std"),
    (lambda: Measurement(Gray(), torch.ones(3), drawn(2, 1, 4, 4)).residual(drawn(2, 3, 4, 4)),
     "noise_std must hold"),
    (lambda: Measurement(Gray(), 0.1, torch.ones(2, 1, dtype=torch.long)), "floats"),
    (lambda: Matrix(drawn(3, 2) * math.nan), "finite"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()
