"""Who else computes the operations of `s4.ops`: a module each, and the table that "auto" chooses by.

A backend is a module (or any object) with

- `status(device)`: True where it can compute on a device, or else the reason why not and what to do;
- some of the operations, with the signatures below. The tensors are checked by `s4.ops` and contiguous, but
  for u and the gradient of y in a scan; what a backend returns is trusted. Where it has no gradient of an
  operation, the plain definition has one.

    cauchy(v, z, w)                                  cauchy_backward(grad, v, z, w, need_z) -> of v, z, w
    response(a, F, G, X, C, L, dtype)                response_backward(grad, a, F, G, X, C) -> of the tensors
    maps(a, F, G, B, C, D, T, dtype) -> four maps    maps_backward(grads, inputs) -> of the six inputs
    scan(u, x, taps, inward, outward, onward, reverse, table) -> y, last
    scan_backward(grads, inputs, reverse, table) -> of the six inputs
    step(a, F, G, B, C, D, x, u) -> y, next x        of ranks up to 2; it has no gradient
    varying(u, rate, x, Lambda, P, B, C, D, dt, resets, positions, discretization) -> y, states
    varying_backward(grads, inputs, resets, positions, discretization) -> of the nine inputs from u to dt
                                                     of ranks up to 2, by "bilinear" and "zoh"

Shapes and meaning are those of the plain definitions in `s4/ops/`; a, F, G, B and C are the fields of a
`s4.system.Recurrence`.

To add one, write the module, and name it in `BACKENDS` and, if "auto" is to take it, in `AUTO`.
"""

from types import ModuleType
from typing import Any

from s4.backends import cpu, cuda, keops, naive, plain, triton

OPERATIONS = ("cauchy", "response", "maps", "scan", "step", "varying")
BACKENDS: dict[str, ModuleType | Any] = {
    "naive": naive,
    "torch": plain,
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "keops": keops,
}
# By operation and type of device: the first that can run is what "auto" takes, plain PyTorch if none can.
# Measured by benchmarks/kernels.py and layer.py on a CPU with AVX-512 and on an H200.
AUTO: dict[str, dict[str, tuple[str, ...]]] = {
    "cauchy": {"cpu": ("cpu",), "cuda": ("cuda", "triton", "keops")},
    "response": {"cpu": ("cpu",)},
    "maps": {"cpu": ("cpu",)},
    "scan": {"cpu": ("cpu",)},
    "step": {"cpu": ("cpu",)},
    "varying": {"cpu": ("cpu",)},
}
