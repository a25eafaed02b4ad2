"""*Networks to train.* Plain torch modules, called as network(x, c, cond=None)."""

from sde_diffusion.networks.layers import Dropout, Fourier
from sde_diffusion.networks.mlp import MLP
from sde_diffusion.networks.unet import PlainUNet, UNet

__all__ = ["MLP", "Dropout", "Fourier", "PlainUNet", "UNet"]
