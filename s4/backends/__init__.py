"""Who else computes the operations of `s4.ops`: a module each, and the table that "auto" chooses by.

A backend is a module (or any object) with

- `status(device)`: True where it can compute on a device, or else the reason why not and what to do;
- some of the operations, as functions of contiguous tensors that `s4.ops` has checked:
  `cauchy` and `cauchy_backward`, `response` and `response_backward`, `maps` and `maps_backward`, `scan` and
  `scan_backward`, `step`. Shapes and meaning are those of the plain definitions there. `step` is asked for
  ranks up to 2, gradients are plain where a backend has none.

To add one, write the module, and name it in `BACKENDS` and, if "auto" is to take it, in `AUTO`.
"""

from types import ModuleType
from typing import Any

from s4.backends import cpu, cuda, keops, naive, plain, triton

OPERATIONS = ("cauchy", "response", "maps", "scan", "step")
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
}
