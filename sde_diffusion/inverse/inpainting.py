r"""Inpainting: completion of images with unknown pixels. Sampler -> Sampler.

Convention: mask is 1 where a pixel of y is known and 0 elsewhere; it broadcasts against x. The
unknown pixels of y are ignored.

After each step `Replacement` and `RePaint` replace the known pixels by those of y with noise of the
new level, so at the end they are bit-equal to y. `complete_image` moves x down the gradient of
their error instead (the rule of the Haifa exercise sheet), by either gradient of corrections.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor

from sde_diffusion.data.rules import warn_of_size
from sde_diffusion.inverse.corrections import BackpropCorrection, Corrected, PosteriorMeanCorrection
from sde_diffusion.inverse.measurements import warn_of_misfit
from sde_diffusion.inverse.operators import binary, broadcast, check_fits
from sde_diffusion.models.guidance import Clipped
from sde_diffusion.models.model import IS_MODEL, Model, per_sample_field
from sde_diffusion.noise.sources import Noise
from sde_diffusion.processes.level import Level, coordinates, forward_kernel
from sde_diffusion.samplers import Ancestral, Memory, Sampler
from sde_diffusion.samplers.sampler import check_down
from sde_diffusion.sampling import prior, sample
from sde_diffusion.validate import Choice, Cond, Count, arguments, batch

__all__ = ["MaskedMSE", "RePaint", "Replacement", "complete_image"]

FAR = 10.0  # times |y|: an error that only a diverged rule leaves


@dataclass(frozen=True, eq=False)
class Replacement(Corrected):
    r"""Replacement of the known pixels after each step from t to s (Song et al. 2021, I.2):

        x_s = mask (alpha_s y + sigma_s z) + (1 - mask) x_s.

    At s = 0 they are bit-equal to y. The samples are not from the posterior: the unknown pixels of
    x_s are independent of z.

    Args:
        sampler: any.
        y: (B, ...), one per sample, or (1, ...) for all.
        mask: 1 where y is known, 0 elsewhere.
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
        check_down(self, t, s)
        x_s, _ = self.sampler.step(model, x, t, s, noise, None)
        y = check_fits(self.y, x, "x").to(x)
        entered = model.process.perturb(y, s, noise(s.t, s.t, x)) if s.sigma else y
        return torch.where(self.mask.to(x.device) == 1, entered, x_s), None


@dataclass(frozen=True, eq=False)
class RePaint(Replacement):
    r"""Replacement with resampling (Lugmayr et al. 2022, Algorithm 1).

    Each step from t to s is repeated `rounds` times. Between repetitions the forward kernel noises
    the batch from s back to t, so that the unknown pixels can adapt to the known ones. One step
    costs rounds * jump steps of the sampler: n steps here are n * jump steps of the paper, with
    jump length `jump`.

    Args:
        sampler, y, mask: as in `Replacement`.
        rounds: number of repetitions; 10 in the paper's experiments.
        jump: number of sampler steps within one step, equally spaced in t; 10 in the paper's
            experiments.
    """

    rounds: Count = 10
    jump: Count = 1

    def step(
        self, model: Model, x: Tensor, t: Level[float], s: Level[float], noise: Noise,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        check_down(self, t, s)
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
    r"""The cost MSE(mask (x0 - y)), (B,): the mean is over all pixels of one sample.

    Args:
        y, mask: as in `Replacement`.
    Warns:
        RuntimeWarning: at the end of `sample`, if the root of this cost is above 10 times that of
            x0 = 0: the gradient's scale is too large.
    """

    y: Tensor = per_sample_field()
    mask: Tensor = per_sample_field(full_rank=True)

    def __post_init__(self) -> None:
        known("y", self.y, "mask", self.mask)

    @torch.no_grad()
    def after_run(self, x0: Tensor) -> None:
        """Warn of samples whose known pixels are far outside the range of y."""
        found, size = self(x0).sqrt(), self(torch.zeros_like(x0)).sqrt()
        off = found > FAR * size
        if bool(off.any()):
            k = int(torch.where(off, found, 0).argmax())
            ratio = f"{float(found[k]):.3g} at row {k}, for |y| {float(size[k]):.3g}"
            warn_of_misfit(off, f"the RMSE is {ratio}")

    def __call__(self, x0: Tensor) -> Tensor:
        off = torch.where(self.mask.to(x0.device) == 1, x0 - check_fits(self.y, x0, "x").to(x0), 0)
        return coordinates(off).square().mean(1)


Route = type[BackpropCorrection] | type[PosteriorMeanCorrection]
ROUTES = Choice(BackpropCorrection, PosteriorMeanCorrection)


@arguments
def complete_image(
    model: Annotated[Model, IS_MODEL],
    y: Tensor,
    ymask: Tensor,
    scale: float,
    *,
    route: Annotated[Route, ROUTES] = BackpropCorrection,
    clip: bool = False,
    sampler: Sampler | None = None,
    steps: int | None = None,
    times: Tensor | Sequence[float] | None = None,
    cond: Cond | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Complete images of which some pixels are known; the result is shaped like y.

    The rule of the Haifa exercise sheet: after each step, scale times the gradient of
    MSE(ymask (x0_hat - y)), a mean over the pixels of one sample, is subtracted. One call of the
    network per step. To complete an image five times, repeat it: `y.repeat_interleave(5, dim=0)`.

    Args:
        model: a model of images like y.
        y: (B, ...); its unknown pixels are ignored.
        ymask: 1 where y is known, 0 elsewhere; broadcasts against y.
        scale: factor of the gradient. The best value grows with the number of pixels and depends
            on the route: for 28x28 digits in 250 steps it is about 300 for `BackpropCorrection`
            and 2 for `PosteriorMeanCorrection`.
        route: `BackpropCorrection`, or `PosteriorMeanCorrection`, which does not differentiate
            the network.
        clip: clamp x0_hat to [-1, 1], in the gradient and in the step.
        sampler: the rule for a step, Ancestral() by default.
        steps: number of steps on the sampler's own grid; 250 by default.
        times: decreasing times in [0, 1] instead; required for adaptive samplers, which are
            corrected at these times.
        cond, generator, seeds: as in `sample`.
    """
    known("y", y, "ymask", ymask)
    warn_of_size("y", torch.where(ymask.to(y.device) == 1, y, 0), smallest=0.0)
    rule = route(sampler or Ancestral(), MaskedMSE(y, ymask), scale)
    x = prior(model, y.shape, generator=generator, seeds=seeds, dtype=y.dtype, device=y.device)
    clipped = Clipped(model) if clip else model
    steps = 250 if steps is None and times is None else steps
    return sample(
        clipped, rule, x, steps=steps, times=times, cond=cond, generator=generator, seeds=seeds
    )


def known(y_name: str, y: Tensor, mask_name: str, mask: Tensor) -> None:
    """Refuse a mask that does not fit y, and a y that is not finite where it is known."""
    batch(y_name, y)
    mask = broadcast(binary(mask_name, mask), y, mask_name, y_name).to(y.device)
    each = coordinates(mask == 1)
    for rows, value, part in ((~each.any(1), 1, "nothing"), (each.all(1), 0, "everything")):
        if bool(rows.any()):
            shown = f"which shows {part} of sample {int(rows.nonzero()[0])}"
            raise ValueError(f"{mask_name} must be {value} somewhere; got a mask {shown}")
    if not bool((y.isfinite() | (mask != 1)).all()):
        raise ValueError(f"{y_name} must be finite where it is known; got nan or infinity")
