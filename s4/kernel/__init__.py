"""Convolution kernels from the parameters of a layer, and the two sums they are made of."""

from s4.kernel import diag, dplr
from s4.kernel.cauchy import cauchy
from s4.kernel.convolution import METHODS, kernel
from s4.kernel.vandermonde import vandermonde
from s4.ops.dispatch import backends

__all__ = ["METHODS", "backends", "cauchy", "diag", "dplr", "kernel", "vandermonde"]
