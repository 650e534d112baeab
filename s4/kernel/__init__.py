"""Convolution kernels from the parameters of a layer, and the two sums they are made of."""

from s4.kernel import diag as diag
from s4.kernel import dplr as dplr
from s4.kernel.cauchy import cauchy
from s4.kernel.convolution import METHODS as METHODS
from s4.kernel.convolution import kernel as kernel
from s4.kernel.vandermonde import vandermonde
from s4.ops.dispatch import backends

__all__ = ["backends", "cauchy", "vandermonde"]  # the rest is for the library itself
