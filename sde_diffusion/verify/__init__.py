"""*What a sampler's output law is*, by running the sampler. Ours or a peer's."""

from sde_diffusion.verify.certificates import *
from sde_diffusion.verify.comparisons import *
from sde_diffusion.verify.convergence import *
from sde_diffusion.verify.endpoints import *
from sde_diffusion.verify.laws import *
from sde_diffusion.verify.local_orders import *
from sde_diffusion.verify.mixtures import *
from sde_diffusion.verify.peers import *
from sde_diffusion.verify.probe import *
from sde_diffusion.verify.spectra import *
