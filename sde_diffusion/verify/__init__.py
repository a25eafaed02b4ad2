"""*What a sampler's output law is*, by running the sampler. Ours or a peer's."""

from sde_diffusion.verify.agreements import *  # noqa: F403
from sde_diffusion.verify.certificates import *  # noqa: F403
from sde_diffusion.verify.comparisons import *  # noqa: F403
from sde_diffusion.verify.few_steps import *  # noqa: F403
from sde_diffusion.verify.laws import *  # noqa: F403
from sde_diffusion.verify.limits import *  # noqa: F403
from sde_diffusion.verify.mixtures import *  # noqa: F403
from sde_diffusion.verify.orders import *  # noqa: F403
from sde_diffusion.verify.own_steps import *  # noqa: F403
from sde_diffusion.verify.peers import *  # noqa: F403
from sde_diffusion.verify.posteriors import *  # noqa: F403
from sde_diffusion.verify.probe import *  # noqa: F403
