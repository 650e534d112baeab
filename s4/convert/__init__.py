"""Weights of the original repository, github.com/state-spaces/s4, as layers, blocks and models of this one.

`python -m s4.convert in.ckpt folder` does it for files.
"""

from s4.convert.blocks import block
from s4.convert.files import load
from s4.convert.layers import layer
from s4.convert.models import model

__all__ = ["block", "layer", "load", "model"]
