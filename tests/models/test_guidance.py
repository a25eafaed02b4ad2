"""Guidance: exact at its ends, linear between, one call a step, with every sampler."""

import math
from itertools import pairwise

import pytest
import torch
from by_class import MEANS, VARIANCES, ByClass, unit
from cases import FIXED_STEP, OWN_STEPS, PROCESSES
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.models.guidance import (
    ClassifierFree,
    ClassifierGuided,
    Clipped,
    get_context_mask,
)

CLASSES = (0, 1, 2, 2, 1)


def start(process, seed=0, rows=5):
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * process.prior_std


def level_of(process, t):
    return process.levels(torch.tensor([t], dtype=torch.float64))[0]


def network(cond=4, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = sd.networks.UNet(channels=(8,), blocks=1, attention=(), embedding=8, cond=cond)
        for parameter in made.requires_grad_(False).parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return sd.Denoiser(made.to(dtype), sd.VP(), sd.V()).eval()


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


QUANTITIES = ("x0", "eps", "score", "v", "velocity")


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_ends_are_the_models_to_the_bit(quantity, per_sample):
    """w = 1 is the conditional model, w = 0 that of the null context; of a whole batch they are
    called alone, per sample they are what was called in one batch."""
    model, x, level = network(), drawn(3, 1, 8, 8), level_of(sd.VP(), 0.4)
    cond, null = drawn(3, 4, seed=1), drawn(3, 4, seed=2)
    for w, context in ((0.0, null), (1.0, cond)):
        scale = torch.full((3,), w) if per_sample else w
        made = getattr(ClassifierFree(model, cond, null, scale)(x, level), quantity)
        if per_sample:
            both = model(torch.cat([x, x]), level, torch.cat([null, cond]))
            expected = getattr(both, quantity)[3 * int(w) :][:3]
        else:
            expected = getattr(model(x, level, context), quantity)
        assert torch.equal(made, expected)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_it_is_linear_in_the_scale(dtype, bound):
    model = network(dtype=dtype)
    x, cond = drawn(2, 1, 8, 8, dtype=dtype), drawn(2, 4, seed=1, dtype=dtype)
    level = level_of(sd.VP(), 0.5)

    def at(w):
        return ClassifierFree(model, cond, scale=w)(x, level).eps

    none, whole = at(0.0), at(1.0)
    for w in (-1.0, 0.3, 0.5, 2.0, 7.5):
        size = max(1.0, abs(w)) * float(whole.abs().max())
        assert_close(at(w), none + w * (whole - none), rtol=0, atol=4 * bound * size)
        assert (at(w) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("process", PROCESSES)
def test_the_score_is_that_of_bayes_rule(process):
    """score(w) = score of p(x) + w grad log p(c | x), at every level."""
    process = PROCESSES[process]
    model, x = ByClass(process), start(process)
    for t in (0.9, 0.5, 0.1):
        level = level_of(process, t)
        whole, parts = model.parts[0], model.parts[1:]
        z = x.clone().requires_grad_()
        log_p = torch.stack([part.log_prob(z, t) for part in parts])[list(CLASSES), range(5)]
        (gradient,) = torch.autograd.grad((log_p - whole.log_prob(z, t)).sum(), z)
        made = ClassifierFree(model, unit(*CLASSES), scale=2.5)(x, level).score
        assert_close(made, whole(x, level).score + 2.5 * gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FIXED_STEP | OWN_STEPS)
def test_every_sampler_takes_it_at_its_own_number_of_calls(name):
    """At w = 1 it samples each row's own class, bit for bit; guided it makes no more calls."""
    sampler = (FIXED_STEP | OWN_STEPS)[name]
    steps = 6 if name in FIXED_STEP else None
    model, x = ByClass(), start(sd.VP())

    def sampled(scale, cond):
        model.calls = 0
        guided = ClassifierFree(model, cond, scale=scale)
        made = sd.sample(guided, sampler, x, steps=steps, seeds=range(5))
        return made, model.calls

    alone, calls = sampled(1.0, unit(*CLASSES))
    for k in range(3):
        rows = [row for row, c in enumerate(CLASSES) if c == k]
        expected = sd.sample(model.parts[k + 1], sampler, x[rows], steps=steps, seeds=rows)
        # A solver that chooses one step for its whole batch chooses others for other batches.
        assert_close(alone[rows], expected, rtol=0, atol=1e-9 if steps else 1e-3)
    guided, more = sampled(2.5, unit(*CLASSES))
    assert guided.isfinite().all()
    assert (guided - alone).abs().max() > 0.01
    assert more == calls or not steps
    if name.startswith("adaptive"):  # a level of each sample's own: still asked about B at w = 1
        asked = [Rows(model), Rows(model)]
        ours = sd.sample(
            ClassifierFree(asked[0], unit(*CLASSES), scale=1.0), sampler, x, seeds=range(5)
        )
        given = Given(asked[1], unit(*CLASSES))
        assert torch.equal(ours, sd.sample(given, sampler, x, seeds=range(5)))
        assert asked[0].rows == asked[1].rows
    # Scales of each sample's own: every row as it would be alone in the batch's place.
    scales = torch.tensor([1.0, 2.5, 1.0, 2.5, 1.0], dtype=torch.float64)
    mixed, _ = sampled(scales, unit(*CLASSES))
    expected = torch.where(scales[:, None] == 1, alone, guided)
    assert_close(mixed, expected, rtol=0, atol=1e-9 if steps else 1e-3)


class Rows:
    """A conditional model that counts the rows it is asked about."""

    def __init__(self, model):
        self.model, self.process, self.rows = model, model.process, 0

    def __call__(self, x, level, cond):
        self.rows += len(x)
        return self.model(x, level, cond)


class Given:
    """The conditional model at one condition for each row, without guidance."""

    def __init__(self, model, cond):
        self.model, self.process, self.cond = model, model.process, cond

    def __call__(self, x, level):
        return self.model(x, level, self.cond)

    def rows(self, index):
        return Given(self.model, self.cond[index])


def test_an_interval_leaves_the_conditional_model_outside_of_it():
    """Each level on its own side; per sample too; the ends of the interval belong to it."""
    process = sd.RectifiedFlow()
    model, cond, x = ByClass(process), unit(*CLASSES), start(process)
    guided = ClassifierFree(model, cond, scale=3.0, interval=(0.5, 2.0))
    everywhere = ClassifierFree(model, cond, scale=3.0)
    for r in (0.1, 0.45, 0.55, 1.0, 1.9, 2.1, 50.0):
        level = level_of(process, r / (1 + r))
        model.calls = 0
        inside = 0.5 <= r <= 2.0
        expected = everywhere(x, level).x0 if inside else model(x, level, cond).x0
        assert torch.equal(guided(x, level).x0, expected), r
    for t in torch.linspace(0.01, 0.99, 99).tolist():  # at r itself: no rounding between
        level = level_of(process, t)
        r = level.sigma / level.alpha
        for interval in ((r, math.inf), (0.0, r)):
            at_the_end = ClassifierFree(model, cond, scale=3.0, interval=interval)
            assert at_the_end.weight(level, x) == 3.0
    t = torch.tensor([0.05, 0.4, 0.5, 0.9, 0.6], dtype=torch.float64)
    level = process.level(t, x)
    one_by_one = [
        guided.rows(torch.tensor([k]))(x[k : k + 1], level_of(process, float(t[k]))).eps
        for k in range(5)
    ]
    assert_close(guided(x, level).eps, torch.cat(one_by_one), rtol=1e-12, atol=1e-12)


def test_a_context_of_width_only_serves_the_whole_batch():
    model, x, level = ByClass(), start(sd.VP()), level_of(sd.VP(), 0.3)
    one = ClassifierFree(model, unit(1)[0], unit(2)[0], 2.0)(x, level)
    many = ClassifierFree(model, unit(*[1] * 5), unit(*[2] * 5), 2.0)(x, level)
    assert torch.equal(one.x0, many.x0)


def test_rows_take_their_conditions_and_scales_with_them():
    model, x, level = ByClass(), start(sd.VP()), level_of(sd.VP(), 0.3)
    scale = torch.linspace(-1, 3, 5, dtype=torch.float64)
    guided = ClassifierFree(model, unit(*CLASSES), unit(*CLASSES[::-1]), scale)
    index = torch.tensor([4, 0, 3])
    assert_close(guided.rows(index)(x[index], level).x0, guided(x, level).x0[index], rtol=0, atol=0)


def test_on_another_process_it_is_the_guided_model_there():
    """`match` takes the guided model along; a DDPM takes it as its model."""
    guided = ClassifierFree(ByClass(sd.VP()), unit(*CLASSES), scale=2.0)
    there = ClassifierFree(ByClass(sd.EDM()), unit(*CLASSES), scale=2.0)
    x, level = start(sd.EDM()), level_of(sd.EDM(), 0.02)
    assert_close(sd.match(guided, sd.EDM())(x, level).x0, there(x, level).x0, rtol=1e-9, atol=1e-9)
    chain = sd.Discrete.linear(20)
    ddpm = sd.DDPM(ClassifierFree(ByClass(chain), unit(*CLASSES), scale=2.0))
    assert ddpm.sample((5, 2), seeds=range(5)).isfinite().all()


# ---- compositions ------------------------------------------------------------------------------


def test_negative_guidance_moves_away_from_a_class():
    """Away from class 1 alone: fewer of its points than the model has by itself."""
    model, n = ByClass(), 400
    x = start(sd.VP(), rows=n)

    def share(guided):
        made = sd.sample(guided, sd.Heun(), x, steps=12)
        near = torch.stack([
            -((made - m) ** 2).sum(1) / (2 * v) - v.log()
            for m, v in zip(MEANS, VARIANCES, strict=True)
        ])  # fmt: skip
        return float((near.argmax(0) == 1).double().mean())

    nothing = torch.zeros(3, dtype=torch.float64)
    plain = share(ClassifierFree(model, nothing, scale=1.0))
    avoided = share(ClassifierFree(model, nothing, null=unit(1)[0], scale=2.0))
    error = math.sqrt(plain * (1 - plain) / n)
    assert avoided < plain - 4.5 * error


def test_a_condition_between_two_interpolates():
    """A network's answer goes from one context's to the other's, by no step more than half."""
    model, x, level = network(), drawn(2, 1, 8, 8), level_of(sd.VP(), 0.5)
    a, b = drawn(2, 4, seed=1)
    ends = [ClassifierFree(model, c, scale=1.0)(x, level).x0 for c in (a, b)]
    steps = [
        ClassifierFree(model, torch.lerp(a, b, w / 8), scale=1.0)(x, level).x0 for w in range(9)
    ]
    assert torch.equal(steps[0], ends[0])
    assert torch.equal(steps[-1], ends[1])
    way = (ends[1] - ends[0]).norm()
    assert all((q - p).norm() < way / 2 for p, q in pairwise(steps))


def test_sdedit_keeps_more_of_the_image_the_later_it_starts():
    """SDEdit (Meng et al. 2022): noise an image to time t, and sample from there. On data N(m, v I)
    the flow from t keeps sqrt(alpha^2 v / (alpha^2 v + sigma^2)) of the noised image's distance."""
    data = sd.exact.Gaussian(sd.VP(), torch.tensor([0.5, -0.5]).double(), 0.4)
    image = torch.tensor([[3.0, 2.0]]).double()
    kept = []
    for t in (0.8, 0.5, 0.2):
        level = level_of(sd.VP(), t)
        x = sd.VP().perturb(image, level, torch.zeros_like(image))
        made = sd.sample(data, sd.Heun(), x, times=torch.linspace(t, 0, 60).double())
        assert_close(made, data.flow(x, t, 0.0), rtol=0, atol=2e-3)
        kept.append(float((made - image).norm()))
    assert kept == sorted(kept, reverse=True)


# ---- classifier guidance -----------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
def test_with_the_noisy_classifier_it_is_the_model_of_the_class(process):
    process = PROCESSES[process]
    model, x = ByClass(process), start(process)
    whole, parts = model.parts[0], model.parts[1:]

    def log_prob(z, level, y):
        t = level.t
        log_p = torch.stack([part.log_prob(z, t) for part in parts])
        return log_p[y, torch.arange(len(z))] - whole.log_prob(z, t)

    guided = ClassifierGuided(whole, log_prob, torch.tensor(CLASSES))
    for t in (0.9, 0.5, 0.1):
        level = level_of(process, t)
        made, expected = guided(x, level), model(x, level, unit(*CLASSES))
        assert_close(made.x0, expected.x0, rtol=1e-8, atol=1e-8)
        assert_close(made.eps, expected.eps, rtol=1e-8, atol=1e-8)
    index = torch.tensor([3, 1])
    part = guided.rows(index)(x[index], level)
    assert_close(part.x0, guided(x, level).x0[index], rtol=1e-12, atol=1e-12)
    assert ClassifierGuided(whole, log_prob, torch.tensor(CLASSES), 0.0)(x, level).x0.equal(
        whole(x, level).x0
    )


def test_clipping_holds_x0_and_keeps_the_pair_that_of_x():
    model, x, level = ByClass().parts[0], 3 * start(sd.VP()), level_of(sd.VP(), 0.4)
    found, plain = Clipped(model, -0.7, 0.6)(x, level), model(x, level)
    assert float(plain.x0.max()) > 0.6
    assert float(found.x0.min()) >= -0.7
    assert float(found.x0.max()) <= 0.6
    assert_close(level.alpha * found.x0 + level.sigma * found.eps, x, rtol=1e-12, atol=1e-12)


# ---- training ----------------------------------------------------------------------------------


def test_the_context_mask_drops_with_probability_p():
    n = 20_000
    for p in (0.1, 0.5):
        mask = get_context_mask(n, p, torch.Generator().manual_seed(0))
        assert mask.shape == (n, 1)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert abs(1 - float(mask.mean()) - p) < 4.5 * math.sqrt(p * (1 - p) / n)
    assert get_context_mask(50, 0.0).all()
    assert not get_context_mask(50, 1.0).any()
    again = [get_context_mask(50, 0.5, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: ClassifierFree(ByClass(), unit(0, 1)[None]), r"\(width,\) or \(B, width\)"),
    (lambda: ClassifierFree(ByClass(), unit(0), torch.zeros(2)), "as wide as cond"),
    (lambda: ClassifierFree(ByClass(), unit(0) * math.nan), "finite"),
    (lambda: ClassifierFree(ByClass(), unit(0), scale=math.nan), "scale"),
    (lambda: ClassifierFree(ByClass(), unit(0), scale=torch.tensor([1.0, math.inf])), "scale"),
    (lambda: ClassifierFree(ByClass(), unit(0), interval=(2.0, 1.0)), "low < high"),
    (lambda: ClassifierGuided(ByClass().parts[0], print, unit(0), math.nan), "scale"),
    (lambda: Clipped(ByClass().parts[0], 1.0, 1.0), "high"),
    (lambda: get_context_mask(3, 1.5), "p must"),
    (lambda: get_context_mask(-1, 0.5), "batch"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


@pytest.mark.parametrize(("cond", "scale", "says"), [
    (unit(0, 1), 1.0, "one context per sample, 5; got 2"),
    (unit(*CLASSES), torch.ones(3), "one number per sample, 5; got 3"),
])  # fmt: skip
def test_sizes_that_do_not_fit_the_batch_are_refused(cond, scale, says):
    with pytest.raises(ValueError, match=says):
        ClassifierFree(ByClass(), cond, scale=scale)(start(sd.VP()), level_of(sd.VP(), 0.5))


def test_a_context_of_another_width_is_refused():
    model, x = network(), drawn(2, 1, 8, 8)
    with pytest.raises(ValueError, match="cond must have width 4; got 3"):
        ClassifierFree(model, torch.zeros(3))(x, level_of(sd.VP(), 0.5))


@pytest.mark.parametrize("kind", [torch.float64, torch.int64])
def test_a_network_takes_contexts_of_any_dtype(kind):
    model, x, level = network(), drawn(2, 1, 8, 8), level_of(sd.VP(), 0.5)
    cond = torch.nn.functional.one_hot(torch.tensor([1, 3]), 4)
    assert torch.equal(model(x, level, cond.to(kind)).x0, model(x, level, cond.float()).x0)
    with pytest.raises(ValueError, match="one context per sample, 2; got 3"):
        model(x, level, torch.zeros(3, 4))
