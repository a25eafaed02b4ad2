"""*From a noise level to a lower one.* A sampler is a rule for one step."""

from sde_diffusion.samplers.adams import *
from sde_diffusion.samplers.adaptive_ode import *
from sde_diffusion.samplers.adaptive_sde import *
from sde_diffusion.samplers.ancestral import *
from sde_diffusion.samplers.correctors import *
from sde_diffusion.samplers.euler_maruyama import *
from sde_diffusion.samplers.exponential import *
from sde_diffusion.samplers.external import *
from sde_diffusion.samplers.heun import *
from sde_diffusion.samplers.sampler import *

# With settings in use: tests, certificates, docs and the command line run over these.
CATALOGUE: tuple[Sampler, ...] = (
    Ancestral(),
    Ancestral("beta"),
    Ancestral(eta=0.0),
    EulerMaruyama(),
    *(TorchSDE(method) for method in ("euler", "milstein", "srk")),
    Heun(),
    Churn(Heun(), s_churn=10.0),
    DPMSolver(2),
    DPMSolver(3),
    DPMSolver(2, eta=1.0),
    VelocityMultistep(),
    Langevin(Heun()),
    *(Adams(k) for k in range(1, 6)),
    TorchODE(),
    ScipyODE(),
    AdaptiveODE(),
    AdaptiveSDE(),
)
