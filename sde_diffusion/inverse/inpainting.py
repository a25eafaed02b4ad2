r"""Completing images of which a part is known. Sampler -> Sampler.

Convention: mask is 1 where a pixel of y is known and 0 where not; it broadcasts against x. What is
unknown in y is ignored.

`Replacement` and `RePaint` put the known pixels back after each step, at the noise of the level
that is entered, so that at the end they are those of y to the bit. `complete_image` pulls x towards
them instead (the Haifa sheet's rule), by either gradient of steering.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sde_diffusion import validate
from sde_diffusion.inverse.corrections import BackpropCorrection, Corrected, PosteriorMeanCorrection
from sde_diffusion.inverse.operators import binary, check_broadcast
from sde_diffusion.models.guidance import Clipped
from sde_diffusion.models.model import IS_MODEL, Model, per_sample_field
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes import Level, forward_kernel
from sde_diffusion.processes.level import coordinates
from sde_diffusion.samplers import Ancestral
from sde_diffusion.samplers.sampler import Memory, Sampler
from sde_diffusion.sampling import prior, sample
from sde_diffusion.validate import Cond, Count

__all__ = ["MaskedMSE", "RePaint", "Replacement", "complete_image"]


@dataclass(frozen=True, eq=False)
class Replacement(Corrected):
    r"""After each step from t to s, the known pixels are drawn afresh (Song et al. 2021, I.2):

        x_s = mask (alpha_s y + sigma_s z) + (1 - mask) x_s.

    At s = 0 they are y's, to the bit. Not the posterior: the unknown pixels of x_s never heard of
    these z.

    Args:
        sampler: any.
        y: (B, ...), one per sample, or (1, ...) for all.
        mask: where y is known.
    """

    y: Tensor = per_sample_field()
    mask: Tensor = per_sample_field(full_rank=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        known("y", self.y, "mask", self.mask)

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        x_s, _ = self.sampler.step(model, x, t, s, noise, None)
        y = fitting(self.y, x).to(x)
        entered = model.process.perturb(y, s, noise(s.t, s.t, x)) if s.sigma else y
        return torch.where(self.mask.to(x.device) == 1, entered, x_s), None


@dataclass(frozen=True, eq=False)
class RePaint(Replacement):
    r"""Replacement that goes back and forth (Lugmayr et al. 2022, Algorithm 1).

    Each step from t to s is made `rounds` times, with noise by the forward kernel from s up to t in
    between, so that the unknown pixels can follow the known ones. A step costs rounds * jump of the
    sampler's: n steps with jump j are n j of theirs, gone back over by their jump length j.

    Args:
        sampler, y, mask: as in `Replacement`.
        rounds: r, 10 in their experiments.
        jump: j, the sampler's steps within one, evenly spaced in t; 10 in their experiments.
    """

    rounds: Count = 10
    jump: Count = 1

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        times = torch.linspace(t.t, s.t, self.jump + 1, dtype=torch.float64)
        levels = [t, *model.process.levels(times[1:-1]), s]
        a, b = forward_kernel(s, t)
        for k in range(self.rounds):
            if k:
                x = (x * a).add_(noise(t.t, s.t, x), alpha=b)
            for high, low in pairwise(levels):
                x, _ = super().step(model, x, high, low, noise, None)
        return x, None


@dataclass(frozen=True, eq=False)
class MaskedMSE:
    r"""MSE(mask (x0 - y)), the mean over the pixels of one sample, known or not: (B,).

    Args:
        y, mask: as in `Replacement`.
    """

    y: Tensor = per_sample_field()
    mask: Tensor = per_sample_field(full_rank=True)

    def __post_init__(self) -> None:
        known("y", self.y, "mask", self.mask)

    def __call__(self, x0: Tensor) -> Tensor:
        off = torch.where(self.mask.to(x0.device) == 1, x0 - fitting(self.y, x0).to(x0), 0)
        return coordinates(off).square().mean(1)


Route = type[BackpropCorrection] | type[PosteriorMeanCorrection]


def complete_image(
    model: Model,
    y: Tensor,
    ymask: Tensor,
    scale: float,
    *,
    route: Route = BackpropCorrection,
    clip: bool = False,
    sampler: Sampler | None = None,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    cond: Cond | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Samples of images of which a part is given, shaped like y.

    The Haifa sheet's rule: after each step the gradient of MSE(ymask (x0_hat - y)), a mean over the
    pixels of one sample, is taken off. One call of the network a step. To complete an image five
    times give it five times: `y.repeat_interleave(5, dim=0)`.

    Args:
        model: of images like y.
        y: (B, ...); its unknown pixels are ignored.
        ymask: 1 where y is known, 0 where not; broadcasts against y.
        scale: s of the rule. It grows with the number of pixels, and serves one route: for 28x28
            digits in 250 steps about 300 through the network and 2 to the mean.
        route: `BackpropCorrection`, or `PosteriorMeanCorrection`, which does not differentiate
            the network.
        clip: hold x0_hat to [-1, 1], in the rule and in the step.
        sampler: what steps; the ancestral chain by default.
        steps: on the sampler's own grid; 250 where neither these nor times are given.
        times: any decreasing grid in [0, 1] instead; needed by a sampler that chooses its own
            steps, which is corrected at these times.
        cond, generator, seeds: as in `sample`.
    """
    IS_MODEL("model", model)
    known("y", y, "ymask", ymask)
    cost = MaskedMSE(y, ymask)
    validate.choice("route", route, (BackpropCorrection, PosteriorMeanCorrection))
    rule = route(sampler or Ancestral(), cost, scale)
    x = prior(model, y.shape, generator=generator, seeds=seeds, dtype=y.dtype, device=y.device)
    clipped = Clipped(model) if clip else model
    steps = 250 if steps is None and times is None else steps
    return sample(
        clipped, rule, x, steps=steps, times=times, cond=cond, generator=generator, seeds=seeds
    )


def known(y_name: str, y: Tensor, mask_name: str, mask: Tensor) -> None:
    """Refuse a mask that is not one of y, and a y that is not finite where it is known."""
    validate.batch(y_name, y)
    binary(mask_name, mask)
    check_broadcast(mask, y, mask_name, y_name)
    mask = mask.to(y.device)
    each = coordinates((mask == 1).expand(y.shape))
    for rows, says in ((~each.any(1), "nothing"), (each.all(1), "everything")):
        if bool(rows.any()):
            raise ValueError(f"{mask_name} shows {says} of sample {int(rows.nonzero()[0])}")
    if not bool((y.isfinite() | (mask != 1)).all()):
        raise ValueError(f"{y_name} must be finite where it is known")


def fitting(y: Tensor, x: Tensor) -> Tensor:
    """y, if it is shaped like the batch or like one of its samples."""
    if y.shape[1:] != x.shape[1:] or len(y) not in (1, len(x)):
        raise ValueError(f"y must be shaped like x, {tuple(x.shape)}; got {tuple(y.shape)}")
    return y
