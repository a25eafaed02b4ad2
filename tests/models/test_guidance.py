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
from sde_diffusion.models.model import Bound, select

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


def bound(model, cond, null=None, scale=2.0, **settings):
    """The guided model with its condition, as `sample(..., cond=)` makes it."""
    return Bound(ClassifierFree(model, scale, null, **settings), cond)


HERE = start(sd.VP()), level_of(sd.VP(), 0.5)
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
        made = getattr(bound(model, cond, null, scale)(x, level), quantity)
        if per_sample:
            both = model(torch.cat([x, x]), level, torch.cat([null, cond]))
            expected = getattr(both, quantity)[3 * int(w) :][:3]
        else:
            expected = getattr(model(x, level, context), quantity)
        assert torch.equal(made, expected)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_it_is_linear_in_the_scale(dtype, rounding):
    model = network(dtype=dtype)
    x, cond = drawn(2, 1, 8, 8, dtype=dtype), drawn(2, 4, seed=1, dtype=dtype)
    level = level_of(sd.VP(), 0.5)

    def at(w):
        return bound(model, cond, scale=w)(x, level).eps

    none, whole = at(0.0), at(1.0)
    for w in (-1.0, 0.3, 0.5, 2.0, 7.5):
        size = max(1.0, abs(w)) * float(whole.abs().max())
        assert_close(at(w), none + w * (whole - none), rtol=0, atol=4 * rounding * size)
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
        made = bound(model, unit(*CLASSES), scale=2.5)(x, level).score
        assert_close(made, whole(x, level).score + 2.5 * gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FIXED_STEP | OWN_STEPS)
def test_every_sampler_takes_it_at_its_own_number_of_calls(name):
    """At w = 1 it samples each row's own class, bit for bit; guided it makes no more calls."""
    sampler = (FIXED_STEP | OWN_STEPS)[name]
    steps = 6 if name in FIXED_STEP else None
    model, x = ByClass(), start(sd.VP())

    def sampled(scale, cond):
        model.calls = 0
        guided = ClassifierFree(model, scale)
        made = sd.sample(guided, sampler, x, steps=steps, seeds=range(5), cond=cond)
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
        ours = sd.sample(bound(asked[0], unit(*CLASSES), scale=1.0), sampler, x, seeds=range(5))
        cond = unit(*CLASSES)
        assert torch.equal(ours, sd.sample(asked[1], sampler, x, seeds=range(5), cond=cond))
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


def test_an_interval_leaves_the_conditional_model_outside_of_it():
    """Each level on its own side; per sample too; the ends of the interval belong to it."""
    process = sd.RectifiedFlow()
    model, cond, x = ByClass(process), unit(*CLASSES), start(process)
    guided = bound(model, cond, scale=3.0, interval=(0.5, 2.0))
    everywhere = bound(model, cond, scale=3.0)
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
            at_the_end = bound(model, cond, scale=3.0, interval=interval)
            assert at_the_end.model.weight(level, x) == 3.0
    t = torch.tensor([0.05, 0.4, 0.5, 0.9, 0.6], dtype=torch.float64)
    level = process.level(t, x)
    one_by_one = [
        select(guided, torch.tensor([k]), 2)(x[k : k + 1], level_of(process, float(t[k]))).eps
        for k in range(5)
    ]
    assert_close(guided(x, level).eps, torch.cat(one_by_one), rtol=1e-12, atol=1e-12)


def test_one_condition_serves_the_whole_batch():
    model, x, level = ByClass(), start(sd.VP()), level_of(sd.VP(), 0.3)
    one = bound(model, unit(1), unit(2), 2.0)(x, level)
    many = bound(model, unit(*[1] * 5), unit(*[2] * 5), 2.0)(x, level)
    assert torch.equal(one.x0, many.x0)


def test_rows_take_their_conditions_and_scales_with_them():
    model, x, level = ByClass(), start(sd.VP()), level_of(sd.VP(), 0.3)
    scale = torch.linspace(-1, 3, 5, dtype=torch.float64)
    guided = bound(model, unit(*CLASSES), unit(*CLASSES[::-1]), scale)
    index = torch.tensor([4, 0, 3])
    part = select(guided, index, 2)(x[index], level)
    assert torch.equal(part.x0, guided(x, level).x0[index])


def test_on_another_process_it_is_the_guided_model_there():
    """`match` takes the guided model along; a DDPM takes it as its model."""
    guided = bound(ByClass(sd.VP()), unit(*CLASSES), scale=2.0)
    there = bound(ByClass(sd.EDM()), unit(*CLASSES), scale=2.0)
    x, level = start(sd.EDM()), level_of(sd.EDM(), 0.02)
    assert_close(sd.match(guided, sd.EDM())(x, level).x0, there(x, level).x0, rtol=1e-9, atol=1e-9)
    chain = sd.Discrete.linear(20)
    ddpm = sd.DDPM(bound(ByClass(chain), unit(*CLASSES), scale=2.0))
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

    nothing = torch.zeros(1, 3, dtype=torch.float64)
    plain = share(bound(model, nothing, scale=1.0))
    avoided = share(bound(model, nothing, null=unit(1), scale=2.0))
    error = math.sqrt(plain * (1 - plain) / n)
    assert avoided < plain - 4.5 * error


def test_a_condition_between_two_interpolates():
    """A network's answer goes from one context's to the other's, by no step more than half."""
    model, x, level = network(), drawn(2, 1, 8, 8), level_of(sd.VP(), 0.5)
    a, b = drawn(2, 4, seed=1)
    ends = [bound(model, c[None], scale=1.0)(x, level).x0 for c in (a, b)]
    steps = [bound(model, torch.lerp(a, b, w / 8)[None], scale=1.0)(x, level).x0 for w in range(9)]
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
    part = select(guided, index, 2)(x[index], level)
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
    (lambda: bound(ByClass(), unit(0), torch.zeros(1, 2))(*HERE), "null of cond must be shaped"),
    (lambda: sd.sample(ByClass(), sd.Heun(), HERE[0], steps=2, cond=unit(0) * math.nan), "finite"),
    (lambda: ClassifierFree(ByClass(), math.nan), "scale"),
    (lambda: ClassifierFree(ByClass(), torch.tensor([1.0, math.inf])), "scale"),
    (lambda: ClassifierFree(ByClass(), interval=(2.0, 1.0)), "low < high"),
    (lambda: ClassifierFree(ByClass())(*HERE), "cond must be given"),
    (lambda: bound(Clipped(ByClass()), torch.tensor([1]))(*HERE), "null must be given for cond"),
    (lambda: ClassifierGuided(ByClass().parts[0], print, unit(0), math.nan), "scale"),
    (lambda: Clipped(ByClass().parts[0], 1.0, 1.0), "high"),
    (lambda: get_context_mask(3, 1.5), "p must"),
    (lambda: get_context_mask(-1, 0.5), "batch"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


@pytest.mark.parametrize(("cond", "scale", "says"), [
    (unit(0, 1), 1.0, r"cond must be a tensor of first axis 5 or 1; got \(2, 3\)"),
    (unit(*CLASSES), torch.ones(3), "one number per sample, 5; got 3"),
])  # fmt: skip
def test_sizes_that_do_not_fit_the_batch_are_refused(cond, scale, says):
    with pytest.raises(ValueError, match=says):
        sd.sample(ClassifierFree(ByClass(), scale), sd.Heun(), HERE[0], steps=2, cond=cond)


def test_a_condition_of_another_width_is_refused():
    model, x = network(), drawn(2, 1, 8, 8)
    with pytest.raises(ValueError, match="cond must have width 4; got 3"):
        bound(model, torch.zeros(1, 3))(x, level_of(sd.VP(), 0.5))


@pytest.mark.parametrize("kind", [torch.float64, torch.int64])
def test_a_network_takes_vectors_of_any_dtype(kind):
    model, x, level = network(), drawn(2, 1, 8, 8), level_of(sd.VP(), 0.5)
    cond = torch.nn.functional.one_hot(torch.tensor([1, 3]), 4)
    assert torch.equal(model(x, level, cond.to(kind)).x0, model(x, level, cond.float()).x0)
    with pytest.raises(ValueError, match=r"first axis 2 or 1; got \(3, 4\)"):
        model(x, level, torch.zeros(3, 4))


# ---- conditions of any kind --------------------------------------------------------------------


class Lookup(torch.nn.Module):
    """A network that shifts x by what its condition selects; it checks what it was given."""

    def __init__(self):
        super().__init__()
        self.labels = torch.nn.Embedding(4, 2)
        self.tokens = torch.nn.Linear(3, 2)
        torch.nn.init.normal_(self.labels.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(self.tokens.weight, generator=torch.Generator().manual_seed(1))
        self.requires_grad_(False)

    def shift(self, cond):
        if cond.ndim == 1:  # labels (B,), never cast
            assert cond.dtype == torch.int64
            return self.labels(cond)
        if cond.ndim == 3:  # tokens (B, L, W)
            return self.tokens(cond).mean(1)
        return cond.mean((1, 2, 3))[:, None].expand(-1, 2)  # images (B, C, H, W)

    def forward(self, x, c, cond=None, *, label=None, tokens=None):
        parts = [part for part in (cond, label, tokens) if part is not None]
        return c[:, None] * x + sum(self.shift(part) for part in parts)


N = 5
TOKENS = drawn(N, N, 3, seed=3)  # L = B: positions must not be taken for samples
KINDS = {
    "labels": (torch.tensor([0, 1, 2, 1, 0]), torch.tensor(3)),
    "tokens": (TOKENS, torch.nn.Parameter(torch.full((N, 3), 0.5), requires_grad=False)),
    "images": (drawn(N, 1, 2, 2, seed=4), torch.zeros(1, 2, 2)),
    "mapping": (
        {"label": torch.tensor([0, 1, 2, 1, 0]), "tokens": TOKENS},
        {"label": torch.tensor(3), "tokens": torch.zeros(N, 3)},
    ),
}


def entries(cond):
    return cond.values() if isinstance(cond, dict) else [cond]


def part_of(cond, index):
    return {k: v[index] for k, v in cond.items()} if isinstance(cond, dict) else cond[index]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", [sd.Heun(), sd.AdaptiveODE(), sd.AdaptiveSDE()], ids=str)
def test_a_condition_of_any_kind_follows_its_sample(kind, sampler):
    """Each sample of a batch is the one that its own condition gives alone, guided and not."""
    cond, null = KINDS[kind]
    model = sd.Denoiser(Lookup(), sd.VP(), sd.V(), null=null)
    x, steps = drawn(N, 2), None if sampler.claims.adaptive else 6
    for guided in (
        model,
        ClassifierFree(model, 2.0),
        ClassifierFree(model, torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0])),
        ClassifierFree(Clipped(model, -5, 5), 2.0, null=model.null_like(cond)),
    ):
        made = sd.sample(guided, sampler, x, steps=steps, cond=cond, seeds=range(N))
        for k in range(N):
            row = torch.tensor([k])
            alone = sd.sample(
                select(guided, row, 2), sampler, x[row], steps=steps, cond=part_of(cond, row),
                seeds=[k],
            )  # fmt: skip
            assert_close(made[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_replaces_the_conditions_of_whole_samples_by_the_null(kind):
    cond, null = KINDS[kind]
    model = sd.Denoiser(Lookup(), sd.VP(), sd.V(), null=null)
    keep = torch.tensor([True, False, True, False, False])
    kept = model.with_null(cond, keep)
    for part, whole, none in zip(entries(kept), entries(cond), entries(null), strict=True):
        assert part.dtype == whole.dtype
        assert part.shape == whole.shape
        assert torch.equal(part[keep], whole[keep])
        assert torch.equal(part[~keep], none.expand(3, *none.shape))


def test_a_null_is_needed_unless_cond_is_a_float_vector():
    model, keep = sd.Denoiser(Lookup(), sd.VP(), sd.V()), torch.zeros(N, dtype=torch.bool)
    assert torch.equal(model.with_null(torch.ones(N, 4), keep), torch.zeros(N, 4))
    for cond in (KINDS["labels"][0], TOKENS, torch.ones(N, 4).long()):
        with pytest.raises(ValueError, match="null must be given for cond"):
            model.with_null(cond, keep)
    with pytest.raises(ValueError, match=r"null of cond must have shape \(5, 3\)"):
        sd.Denoiser(Lookup(), sd.VP(), null=torch.zeros(3)).with_null(TOKENS, keep)


def test_a_learned_null_gets_its_gradient():
    null = torch.nn.Parameter(torch.zeros(N, 3))
    model = sd.Denoiser(Lookup(), sd.VP(), sd.V(), null=null)
    assert any(parameter is null for parameter in model.parameters())
    keep = torch.tensor([True, False, True, True, True])
    cond = model.with_null(TOKENS, keep)
    model(drawn(N, 2), 0.5, cond).x0.sum().backward()
    assert null.grad is not None
    assert float(null.grad.abs().sum()) > 0


@pytest.mark.parametrize("count", [1, 3])
def test_guidance_of_a_matched_model_at_levels_of_the_batch(count):
    """Each sample at its own level gives what it gives alone."""
    network = sd.networks.MLP((2,), cond=3)
    model = ClassifierFree(sd.match(sd.Denoiser(network, sd.VP()), sd.EDM()), 2.0)
    x, cond = torch.ones(count, 2), torch.eye(3)[:count]
    t = torch.linspace(0.3, 0.6, count, dtype=torch.float64)
    with torch.no_grad():
        together = model(x, t, cond).x0
        alone = [model(x[k : k + 1], t[k].item(), cond[k : k + 1]).x0 for k in range(count)]
        shared = model(x, sd.EDM().level(0.5, x), cond).x0
    assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert shared.shape == x.shape


def test_a_null_that_does_not_fit_is_refused_by_name():
    model = sd.Denoiser(Mapped(), sd.VP())
    for null in (10, torch.tensor(10)):
        with pytest.raises(ValueError, match="null must be a tensor of first axis B or 1"):
            ClassifierFree(model, null=null)
    guided = ClassifierFree(model, null={"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"null must have the entries of cond, \['a', 'b'\]"):
        guided(torch.ones(2, 2), 0.5, {"a": torch.zeros(2), "b": torch.zeros(2)})
    for names in ({"type": torch.zeros(1)}, {"my-c": torch.zeros(1)}):
        with pytest.raises(ValueError, match="null must have other names"):
            sd.Denoiser(Mapped(), sd.VP(), null=names)
    with pytest.raises(ValueError, match="cond must have one or more entries"):
        sd.sample(model, sd.Heun(), torch.ones(2, 2), steps=1, cond={})


class Mapped(torch.nn.Module):
    def forward(self, x, c, a, b):
        return x


@pytest.mark.parametrize("null", [
    torch.tensor(10), torch.zeros(3, dtype=torch.float64), torch.nn.Parameter(torch.ones(3)),
    {"a": torch.tensor(7), "b": torch.nn.Parameter(torch.ones(2, 2))},
], ids=["label", "float64", "learned", "mapping"])  # fmt: skip
def test_a_null_of_any_dtype_is_saved_with_its_model(null, tmp_path):
    model = sd.Denoiser(sd.networks.MLP((2,), cond=3), sd.VP(), null=null)
    model.save(tmp_path / "model.safetensors")
    loaded = sd.Denoiser.load(tmp_path / "model.safetensors")
    for name, value in model.null.state_dict().items():
        assert torch.equal(loaded.null.state_dict()[name], value)
        assert loaded.null.state_dict()[name].dtype == value.dtype
    learned = [set(dict(m.null.named_parameters())) for m in (model, loaded)]
    assert learned[0] == learned[1]


def test_a_condition_is_refused_where_the_model_inside_takes_none():
    inner = sd.exact.Gaussian(sd.VP(), torch.zeros(2), 1.0)
    for model in (sd.models.Clipped(inner), sd.match(inner, sd.EDM())):
        with pytest.raises(TypeError, match="cond must be left out"):
            sd.sample(model, sd.Heun(), torch.ones(2, 2), steps=1, cond=torch.zeros(2, 3))
