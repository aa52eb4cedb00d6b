"""A model that runs: opened from disk, block by block, or to generate text."""

from qcore.model.block import Activations, Block, TapFunction
from qcore.model.model import Artifact, Model, open_model

__all__ = ["Activations", "Artifact", "Block", "Model", "TapFunction", "open_model"]
