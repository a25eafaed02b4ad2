"""*Networks to train.* Plain torch modules, called as network(x, c, cond=None)."""

from sde_diffusion.networks.dropout import Dropout
from sde_diffusion.networks.embeddings import Fourier
from sde_diffusion.networks.mlp import MLP
from sde_diffusion.networks.plain import PlainUNet
from sde_diffusion.networks.unet import UNet

__all__ = ["MLP", "Dropout", "Fourier", "PlainUNet", "UNet"]
