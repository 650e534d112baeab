"""S4: structured state space layers for PyTorch."""

from s4 import hippo, kernel, padding
from s4.block import S4Block
from s4.generation import categorical, greedy
from s4.layer import S4Layer
from s4.model import S4Model
from s4.ops import flops as _flops  # noqa: F401 - tells torch of them
from s4.optim import param_groups
from s4.state import State
from s4.version import __version__ as __version__

__all__ = [
    "S4Block",
    "S4Layer",
    "S4Model",
    "State",
    "categorical",
    "greedy",
    "hippo",
    "kernel",
    "padding",
    "param_groups",
]
