"""What is done in a latent space, for any model."""

from .space import LatentSpace

__all__ = ["LatentSpace"]
