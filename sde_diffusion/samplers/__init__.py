"""*From a noise level to a lower one.* A sampler is a rule for one step."""

from sde_diffusion.samplers.adams import Adams
from sde_diffusion.samplers.adaptive_ode import AdaptiveODE
from sde_diffusion.samplers.adaptive_sde import AdaptiveSDE
from sde_diffusion.samplers.ancestral import Ancestral
from sde_diffusion.samplers.correctors import Churn, Langevin
from sde_diffusion.samplers.euler_maruyama import EulerMaruyama
from sde_diffusion.samplers.exponential import DPMSolver, VelocityMultistep
from sde_diffusion.samplers.external import ScipyODE, TorchODE, TorchSDE
from sde_diffusion.samplers.heun import Heun
from sde_diffusion.samplers.sampler import Claims, Memory, Sampler, SampleReport, SolverError

__all__ = [
    "CATALOGUE",
    "Adams",
    "AdaptiveODE",
    "AdaptiveSDE",
    "Ancestral",
    "Churn",
    "Claims",
    "DPMSolver",
    "EulerMaruyama",
    "Heun",
    "Langevin",
    "Memory",
    "SampleReport",
    "Sampler",
    "ScipyODE",
    "SolverError",
    "TorchODE",
    "TorchSDE",
    "VelocityMultistep",
]

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
