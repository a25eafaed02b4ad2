"""Certificates: all checks of a fixed-step sampler, in one report."""

from collections.abc import Sequence
from dataclasses import dataclass

from sde_diffusion.validate import arguments
from sde_diffusion.verify import convergence, local_orders, probe
from sde_diffusion.verify.convergence import Limit, Order
from sde_diffusion.verify.laws import Law

__all__ = ["Certificate", "certificate"]


@dataclass(frozen=True, repr=False)
class Certificate:
    """The checks of one sampler on one process.

    Attributes:
        sampler, process: their names.
        law: its exact law at the most steps.
        order, local_order, limit: see there; local_order is None for a sampler with levels of its
            own, limit for a chain, whose number of steps is bounded.
    """

    sampler: str
    process: str
    law: Law
    order: Order
    local_order: local_orders.LocalOrder | None
    limit: Limit | None

    @property
    def parts(self) -> list[Law | Order | local_orders.LocalOrder | Limit]:
        parts = [self.law, self.order, self.local_order, self.limit]
        return [part for part in parts if part is not None]

    @property
    def holds(self) -> bool:
        return all(part.holds for part in self.parts)

    @property
    def verdict(self) -> str:
        """The verdicts of the failing parts, if any."""
        return "; ".join(part.verdict for part in self.parts if not part.holds) or "all checks hold"

    def __str__(self) -> str:
        title = f"certificate of {self.sampler} on {self.process}"
        return "\n\n".join([title, *map(str, self.parts), f"in all: {self.verdict}"])

    __repr__ = __str__


@arguments
def certificate(
    sampler: convergence.Family,
    data: probe.AModel,
    process: probe.AProcess | None = None,
    *,
    sizes: Sequence[int] = (64, 128, 256, 512),
) -> Certificate:
    """Check law, order, local order and limit of a fixed-step sampler on Gaussian data.

    The order is fitted to the first three sizes, the limit extrapolated from all four.

    Args:
        sampler: a Sampler; or a function of the number of steps that makes one.
        data: exact.Gaussian.
        process: as in `law`.
        sizes: four numbers of steps, each twice the one before.
    """
    sizes = convergence.checked_sizes(sizes, 4)
    some, laws = convergence.ladder(sampler, data, process, sizes)
    on = process or getattr(some, "process", data.process)
    single = None if some.claims.adaptive else local_orders.local_order(some, data, process)
    tends = None if on.chain_steps else convergence.extrapolated(some, data, sizes, laws)
    converges = convergence.fitted(some, data, sizes[:3], laws[:3])
    name = convergence.of_family(some)
    return Certificate(name, type(on).__name__, laws[-1], converges, single, tends)
