"""*What a sampler's output law is*, by running the sampler. Ours or a peer's."""

from sde_diffusion.verify.certificates import *  # noqa: F403
from sde_diffusion.verify.comparisons import *  # noqa: F403
from sde_diffusion.verify.convergence import *  # noqa: F403
from sde_diffusion.verify.endpoints import *  # noqa: F403
from sde_diffusion.verify.laws import *  # noqa: F403
from sde_diffusion.verify.local_orders import *  # noqa: F403
from sde_diffusion.verify.mixtures import *  # noqa: F403
from sde_diffusion.verify.peers import *  # noqa: F403
from sde_diffusion.verify.probe import *  # noqa: F403
from sde_diffusion.verify.spectra import *  # noqa: F403
