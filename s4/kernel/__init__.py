"""Convolution kernels from SSM parameters, and the two sums they are made of."""

from s4.kernel import diag, dplr
from s4.kernel._choice import backends
from s4.kernel.cauchy import cauchy
from s4.kernel.vandermonde import vandermonde

__all__ = ["backends", "cauchy", "diag", "dplr", "vandermonde"]
