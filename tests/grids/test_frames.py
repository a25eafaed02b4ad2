"""Frames: exact changes of variables, and what each of them leaves to integrate."""

import math

import pytest
import torch
from cases import PROCESSES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import normal
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import data
from sde_diffusion.files import storage
from sde_diffusion.grids import frames

MEAN = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)
ROOT = torch.tensor([[0.6, 0.2, 0.0], [0.2, 0.5, -0.3], [0.0, -0.3, 0.4]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
GAUSSIAN = frames.GaussianFrame.of(MEAN, COVARIANCE)
FRAMES = {
    "straight": frames.Straight(),
    "gaussian": GAUSSIAN,
    "low-rank": frames.GaussianFrame.of(MEAN, COVARIANCE, rank=1),
    "isotropic": frames.GaussianFrame(torch.zeros(()), torch.eye(3)[:, :1], torch.ones(1), 1.0),
}
EACH = pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
ON_EACH = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def level(process, t):
    return process.levels(torch.tensor([t], dtype=torch.float64))[0]


def model(process, covariance=COVARIANCE, mean=MEAN):
    return sd.exact.Gaussian(process, mean, covariance)


# ---- the change of variables ------------------------------------------------------------------


@EACH
@ON_EACH
@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 1.0])
def test_leaving_is_the_inverse_of_entering(frame, process, t):
    """To rounding, times the largest stretch of the frame: sqrt(C / S), at most 200 here."""
    at = level(process, t)
    x = (at.alpha + at.sigma) * normal(5, 3)
    back = frame.leave(frame.enter(x, at), at)
    assert_close(back, x, rtol=0, atol=1e-11 * (at.alpha + at.sigma))


@EACH
def test_at_the_data_every_frame_is_x0_and_its_clock_is_0(frame):
    at, x = level(sd.VP(), 0.0), normal(5, 3)
    assert frame.clock(at) == 0
    assert_close(frame.enter(x, at), x, rtol=1e-12, atol=1e-12)
    assert_close(frame.leave(x, at), x, rtol=1e-12, atol=1e-12)


@EACH
@ON_EACH
def test_the_clock_falls_with_the_noise_and_tells_the_log_snr(frame, process):
    times = torch.linspace(0, 1, 33, dtype=torch.float64)[1:]
    levels = process.levels(times)
    readings = torch.tensor([frame.clock(at) for at in levels], dtype=torch.float64)
    assert bool((readings[1:] > readings[:-1]).all())
    inner = [i for i, at in enumerate(levels) if at.alpha > 0]
    told = frame.log_snr(readings[inner])
    # near pure noise the reading c is within ratio^-1 of its end: an ulp of it is ratio ulps
    for one, i in zip(told.tolist(), inner, strict=True):
        ratio = levels[i].sigma / levels[i].alpha
        assert one == pytest.approx(levels[i].log_snr, rel=1e-12, abs=8e-16 * (ratio + 1 / ratio))


@EACH
@ON_EACH
def test_the_slope_is_the_derivative_along_the_exact_flow(frame, process):
    """Central differences of z along the flow of other Gaussian data.

    Their error is h^2 / 6 times the third derivative: with h = 1e-4 below 1e-6 for derivatives of
    up to 500; the rounding of z, 1e-15 / h, is below 1e-10.
    """
    other = model(process, 0.3 * torch.eye(3, dtype=torch.float64), -MEAN)
    x = process.prior((4, 3), seeds=range(4), dtype=torch.float64)
    top, h = frame.clock(level(process, process.t_max)), 1e-4
    for reading in (0.1 * top, 0.5 * top, 0.9 * top):
        wanted = torch.tensor([reading + h, reading, reading - h], dtype=torch.float64)
        above, here, below = process.time(frame.log_snr(wanted)).tolist()
        ends = []
        for t in (above, below):
            at = level(process, t)
            ends.append((frame.clock(at), frame.enter(other.flow(x, 1.0, t), at)))
        (c_above, z_above), (c_below, z_below) = ends
        at = level(process, here)
        slope = frame.slope(other(other.flow(x, 1.0, here), at))
        assert_close((z_above - z_below) / (c_above - c_below), slope, rtol=1e-5, atol=1e-5)


# ---- the Gaussian frame -----------------------------------------------------------------------


@ON_EACH
@pytest.mark.parametrize("t", [0.0, 1e-3, 0.3, 0.7, 1.0])
def test_the_slope_of_its_own_gaussian_is_zero(process, t):
    """alpha S eps and sigma (x0 - m) cancel: what is left is the rounding of either."""
    at = level(process, t)
    x = at.alpha * MEAN + (at.alpha + at.sigma) * normal(6, 3)
    slope = GAUSSIAN.slope(model(process)(x, at))
    scale = (
        float((1 / GAUSSIAN.variances.min()) ** 0.5) * float(x.abs().max()) / at.sigma if t else 1
    )
    assert float(slope.abs().max()) <= 1e-13 * max(scale, 1.0) * 10


@ON_EACH
def test_entering_is_the_exact_flow_to_the_data(process):
    x = process.prior((6, 3), seeds=range(6), dtype=torch.float64)
    for t in (1.0, 0.4, 0.01):
        wanted = model(process).flow(x, t, 0.0)
        assert_close(GAUSSIAN.enter(x, level(process, t)), wanted, rtol=1e-10, atol=1e-10)


def test_low_rank_plus_isotropic_is_full_rank_where_the_spectrum_is():
    spectrum = torch.tensor([0.1, 0.1, 0.1, 0.7, 2.0], dtype=torch.float64)
    axes = torch.linalg.qr(normal(5, 5)).Q
    mean = normal(5)
    full = frames.GaussianFrame.of(mean, axes * spectrum @ axes.T)
    low = frames.GaussianFrame.of(mean, axes * spectrum @ axes.T, rank=2)
    assert low.axes.shape == (5, 2)
    assert low.rest == pytest.approx(0.1, rel=1e-12)
    x, at = normal(4, 5), level(sd.VP(), 0.4)
    said = model(sd.VP(), 0.3 * torch.eye(5, dtype=torch.float64), mean)(x, at)
    assert_close(low.enter(x, at), full.enter(x, at), rtol=1e-12, atol=1e-12)
    assert_close(low.leave(x, at), full.leave(x, at), rtol=1e-12, atol=1e-12)
    assert_close(low.slope(said), full.slope(said), rtol=1e-12, atol=1e-12)


def test_with_the_unit_gaussian_the_slope_is_v_in_the_angle():
    """dz/dtheta = (alpha eps - sigma x0) / sqrt(alpha^2 + sigma^2), Salimans & Ho 2022, App. D."""
    for process in PROCESSES.values():
        at = level(process, 0.5)
        said = model(process)(normal(4, 3), at)
        scale = math.hypot(at.alpha, at.sigma)
        slope = FRAMES["isotropic"].slope(said)
        assert_close(slope, said.v / scale, rtol=1e-12, atol=1e-12 / scale)


def test_small_eigenvalues_are_raised_to_the_floor():
    """Constant pixels: without a floor their direction could not be left again."""
    singular = torch.diag(torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64))
    floor = data.DEQUANTIZATION
    frame = frames.GaussianFrame.of(torch.zeros(3, dtype=torch.float64), singular, floor=floor)
    assert frame.variances.tolist() == pytest.approx([floor, 0.25, 1.0], rel=1e-12)
    with pytest.raises(ValueError, match=r"variances must be positive.*use a floor"):
        frames.GaussianFrame.of(torch.zeros(3, dtype=torch.float64), singular)


@EACH
def test_levels_of_each_sample_give_what_one_level_for_each_gives(frame):
    process, x = sd.VP(), normal(4, 3)
    times = torch.tensor([0.9, 0.5, 0.2, 0.01], dtype=torch.float64)
    many = process.level(times, x)
    said = model(process)(x, many)
    for i, t in enumerate(times.tolist()):
        one, row = level(process, t), slice(i, i + 1)
        assert_close(frame.enter(x, many)[row], frame.enter(x[row], one), rtol=1e-12, atol=1e-12)
        assert_close(frame.leave(x, many)[row], frame.leave(x[row], one), rtol=1e-12, atol=1e-12)
        alone = frame.slope(model(process)(x[row], one))
        assert_close(frame.slope(said)[row], alone, rtol=1e-11, atol=1e-11)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_are_kept_and_inputs_are_not_changed(frame, dtype):
    process = sd.VP()
    x = process.prior((4, 3, 1), seeds=range(4), dtype=dtype)
    before, at = x.clone(), level(process, 0.5)
    said = sd.models.truth(x, x.flip(0), at)
    for made in (frame.enter(x, at), frame.leave(x, at), frame.slope(said)):
        assert made.dtype == dtype
        assert made.shape == x.shape
        assert bool(made.isfinite().all())
    assert torch.equal(x, before)


@given(st.integers(1, 6), st.integers(0, 2**31), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_any_covariance_has_a_frame_that_explains_its_gaussian(d, seed, t):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    covariance = root @ root.T + 0.01 * torch.eye(d, dtype=torch.float64)
    mean = torch.randn(d, generator=generator, dtype=torch.float64)
    x = torch.randn(3, d, generator=generator, dtype=torch.float64)
    frame, at = frames.GaussianFrame.of(mean, covariance), level(sd.RectifiedFlow(), t)
    assert_close(frame.leave(frame.enter(x, at), at), x, rtol=1e-9, atol=1e-9)
    slope = frame.slope(model(sd.RectifiedFlow(), covariance, mean)(x, at))
    assert float(slope.abs().max()) <= 1e-8


@ON_EACH
def test_the_root_of_the_posterior_covariance_is_that_of_bayes_rule(process):
    """L L = (S^-1 + alpha^2 / sigma^2 I)^-1, of full and of low rank, and of an exact Gaussian."""
    at, eye = level(process, 0.6), torch.eye(3, dtype=torch.float64)
    low = FRAMES["low-rank"]
    of_low = low.rest * (eye - low.axes @ low.axes.T) + low.axes * low.variances @ low.axes.T
    variances = torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64)
    cases = [
        (GAUSSIAN, COVARIANCE), (low, of_low), (model(process), COVARIANCE),
        (model(process, variances), variances.diag()),
        (model(process, torch.tensor(0.3, dtype=torch.float64)), 0.3 * eye),
    ]  # fmt: skip
    for frame, covariance in cases:
        wanted = torch.linalg.inv(torch.linalg.inv(covariance) + at.alpha**2 / at.sigma**2 * eye)
        root = frame.posterior_root(eye, at)
        assert_close(root @ root, wanted, rtol=1e-7, atol=1e-7 * float(wanted.max()))


# ---- bad input and files ----------------------------------------------------------------------

REFUSALS = {
    "axes and variances must be": lambda: frames.GaussianFrame(
        MEAN, torch.eye(3), torch.ones(2), 1.0
    ),
    "mean must have 3 coordinates": lambda: frames.GaussianFrame(
        torch.zeros(2), torch.eye(3), torch.ones(3), 1.0
    ),
    "variances must be positive": lambda: frames.GaussianFrame(
        MEAN, torch.eye(3), torch.tensor([1.0, 0.0, 1.0]), 1.0
    ),
    "mean must be finite": lambda: frames.GaussianFrame(
        torch.full((3,), math.nan), torch.eye(3), torch.ones(3), 1.0
    ),
    "rest must lie": lambda: frames.GaussianFrame(MEAN, torch.eye(3), torch.ones(3), 0.0),
    "covariance must be": lambda: frames.GaussianFrame.of(MEAN, torch.eye(2)),
    "rank must be at most 3": lambda: frames.GaussianFrame.of(MEAN, COVARIANCE, rank=4),
    "floor must lie": lambda: frames.GaussianFrame.of(MEAN, COVARIANCE, floor=-1.0),
    "path must end in": lambda: GAUSSIAN.save("frame.pt"),
    "name must be one of mnist": lambda: frames.GaussianFrame.pretrained("cats"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_arguments_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        REFUSALS[message]()


def test_a_frame_of_other_samples_is_refused_by_shape():
    with pytest.raises(ValueError, match=r"x must have 3 coordinates per sample.*got 4"):
        GAUSSIAN.enter(normal(2, 4), level(sd.VP(), 0.5))


def test_a_saved_frame_is_the_same_to_float32_and_damage_is_noticed(tmp_path):
    path = tmp_path / "frame.safetensors"
    low = FRAMES["low-rank"]
    low.save(path, source="a test")
    again = frames.GaussianFrame.load(path)
    assert again.rest == low.rest
    for name in ("mean", "axes", "variances"):
        assert_close(getattr(again, name), getattr(low, name), rtol=1e-7, atol=1e-7)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(storage.BadFile, match="SHA-256"):
        frames.GaussianFrame.load(path)
    storage.write(path, {"mean": MEAN}, {"rest": 1.0})
    with pytest.raises(storage.BadFile, match="no tensor 'axes'"):
        frames.GaussianFrame.load(path)


def test_the_packaged_frame_is_that_of_28x28_digits():
    frame = frames.GaussianFrame.pretrained("mnist")
    assert frame.mean.shape == (1, 28, 28)
    assert float(frame.variances.min()) >= data.DEQUANTIZATION
    identity = frame.axes.T @ frame.axes
    assert_close(identity, torch.eye(len(identity), dtype=torch.float64), rtol=0, atol=1e-5)
    x, at = (
        torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
        level(sd.VP(), 0.5),
    )
    assert_close(frame.leave(frame.enter(x, at), at), x, rtol=1e-4, atol=1e-4)


def test_moments_of_dequantized_images_are_those_of_their_pixels():
    """Against two million draws of x = (pixel + u) / 128 - 1, within 4.5 standard errors."""
    pixels = torch.tensor([[0, 255], [255, 255], [10, 255]], dtype=torch.uint8)
    images = data.Images(pixels.reshape(3, 1, 1, 2), torch.zeros(3))
    mean, covariance = data.moments(images)
    n, generator = 2_000_000, torch.Generator().manual_seed(1)
    index = torch.randint(3, (n,), generator=generator)
    x, _ = images.batch(index, torch.rand(n, 1, 1, 2, generator=generator))
    x = x.reshape(n, 2).double()
    assert bool(((x.mean(0) - mean.flatten()).abs() <= 4.5 * x.std(0) / n**0.5).all())
    off = x - mean.flatten()
    products = off[:, :, None] * off[:, None, :]
    assert bool(((products.mean(0) - covariance).abs() <= 4.5 * products.std(0) / n**0.5).all())
    assert float(covariance[1, 1]) == pytest.approx(data.DEQUANTIZATION, rel=1e-9)
