"""*What a sampler's output law is*, by running the sampler. Ours or a peer's."""

from sde_diffusion.verify.agreements import Agreement, agreement
from sde_diffusion.verify.certificates import Certificate, certificate
from sde_diffusion.verify.comparisons import Identities, identities
from sde_diffusion.verify.few_steps import Guarantee, steps_for
from sde_diffusion.verify.laws import Law, law, measured
from sde_diffusion.verify.limits import Limit, limit
from sde_diffusion.verify.mixtures import Distribution, Endpoint, distribution, endpoint, flow
from sde_diffusion.verify.orders import LocalOrder, Order, local_order, order
from sde_diffusion.verify.own_steps import Bias, Tolerances, bias, tolerances
from sde_diffusion.verify.peers import Azula, Diffusers, Function, KDiffusion, ratios
from sde_diffusion.verify.posteriors import Inverse, Problem, inverse
from sde_diffusion.verify.probe import NotAffine

__all__ = [
    "Agreement",
    "Azula",
    "Bias",
    "Certificate",
    "Diffusers",
    "Distribution",
    "Endpoint",
    "Function",
    "Guarantee",
    "Identities",
    "Inverse",
    "KDiffusion",
    "Law",
    "Limit",
    "LocalOrder",
    "NotAffine",
    "Order",
    "Problem",
    "Tolerances",
    "agreement",
    "bias",
    "certificate",
    "distribution",
    "endpoint",
    "flow",
    "identities",
    "inverse",
    "law",
    "limit",
    "local_order",
    "measured",
    "order",
    "ratios",
    "steps_for",
    "tolerances",
]
