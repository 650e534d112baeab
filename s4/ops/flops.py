"""Floating point operations of the operators, for torch.utils.flop_counter.FlopCounterMode.

Counted is the arithmetic of the fused code; a multiplication and an addition are one each. Torch counts no
FFT, no single steps where gradients are recorded, and nothing of a layer compiled for evaluation. A backward
pass of maps and responses takes three times the forward, as its factors are made again.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from s4.ops import cauchy, chunks, maps, response, scan, step, varying  # noqa: F401 - whose operators they are

Shape = Sequence[int]


def _moved(N: int, rank: int) -> int:
    """A x of a diagonal of N/2 complex numbers plus a low rank."""
    return 3 * N + 4 * rank * N


def _power(N: int, rank: int, T: int) -> int:
    """A^T as a dense matrix, of a diagonal and two orbits for each rank."""
    return rank * T * (_moved(N, rank) + _moved(N, 0) + 2 * N * N) if rank else 3 * N


def of_scan(u: Shape, x: Shape, taps: Shape, inward: Shape, *_: Any, **__: Any) -> int:
    (B, L, H), (T, N) = u, inward[1:]
    return B * H * _chunks(L, T) * (2 * T * T + 4 * T * N + 2 * N * N)


def of_scan_backward(grads: Sequence[Shape], inputs: Sequence[Shape], *_: Any, **__: Any) -> int:
    (B, L, H), (T, N) = inputs[0], inputs[3][1:]
    return B * H * _chunks(L, T) * (4 * T * T + 10 * T * N + 6 * N * N)


def of_states(u: Shape, x: Shape, inward: Shape, onward: Shape, positions: Shape, *_: Any, **__: Any) -> int:
    (B, L, H), (T, N), P = u, inward[1:], positions[1]
    return B * H * (_chunks(L, T) * (2 * T * N + 2 * N * N) + 2 * P * T * N)


def of_states_backward(
    grads: Sequence[Shape], inputs: Sequence[Shape], positions: Shape, *_: Any, **__: Any
) -> int:
    (B, L, H), (T, N), P = inputs[0], inputs[2][1:], positions[1]
    return B * H * (_chunks(L, T) * (6 * T * N + 6 * N * N) + 4 * P * T * N)


def _chunks(L: int, T: int) -> int:
    return max(1, -(-L // T))


def of_maps(a: Shape, F: Shape, G: Shape, B: Shape, C: Shape, D: Shape, T: int, *_: Any, **__: Any) -> int:
    (H, N), rank, c = a, F[0], C[0]
    return H * ((1 + c) * T * _moved(N, rank) + 2 * c * T * N + _power(N, rank, T))


def of_maps_backward(grads: Sequence[Shape], inputs: Sequence[Shape], *_: Any, **__: Any) -> int:
    a, F, G, B, C, D = inputs
    return 3 * of_maps(a, F, G, B, C, D, grads[1][1])


def of_power(a: Shape, F: Shape, G: Shape, B: Shape, C: Shape, D: Shape, T: int, *_: Any, **__: Any) -> int:
    return of_maps(a, F, G, B, C, D, T) if T else 0  # the power is made with the other maps


def of_power_backward(grad: Shape, inputs: Sequence[Shape], T: int, *_: Any, **__: Any) -> int:
    a, F, G, B, C, D = inputs
    return 3 * of_power(a, F, G, B, C, D, T)


def of_response(a: Shape, F: Shape, G: Shape, X: Shape, C: Shape, L: int, *_: Any, **__: Any) -> int:
    (H, N), rank, q, c = a, F[0], X[1], C[0]
    T = max(1, round(math.sqrt(L * c / max(1, q))))  # columns A^b X, as many as there are rows C A^(a T)
    row = 2 * N * N if rank else 3 * N
    made = q * T * _moved(N, rank) + _power(N, rank, T) + c * (L // T) * row
    return H * (made + 2 * N * L * c * q)


def of_response_backward(
    grad: Shape, a: Shape, F: Shape, G: Shape, X: Shape, C: Shape, *_: Any, **__: Any
) -> int:
    return 3 * of_response(a, F, G, X, C, grad[-1])


def of_cauchy(v: Shape, z: Shape, w: Shape, *_: Any, **__: Any) -> int:
    """Two reciprocals of complex numbers, and a product and a sum with each for each row of weights."""
    (G, q, n), nodes = v, z[1]
    return G * n * nodes * 2 * (11 + 8 * q)


def of_cauchy_backward(grad: Shape, v: Shape, z: Shape, w: Shape, *_: Any, **__: Any) -> int:
    return 2 * of_cauchy(v, z, w)


def of_step(a: Shape, F: Shape, G: Shape, B: Shape, C: Shape, D: Shape, x: Shape, *_: Any, **__: Any) -> int:
    batch, H, N = x
    return batch * H * (_moved(N, F[0]) + 4 * N + 2)


def of_step_kept(system: Sequence[Shape | None], D: Shape, x: Shape, *_: Any, **__: Any) -> int:
    batch, H, N = x
    P = system[5]
    return batch * H * (_moved(N, P[0] if P else 0) + 4 * N + 2)


def of_varying(
    u: Shape,
    rate: Shape,
    x: Shape,
    Lambda: Shape,
    P: Shape,
    B: Shape,
    C: Shape,
    D: Shape,
    dt: Shape,
    resets: Shape | None,
    positions: Shape,
    discretization: str,
    *_: Any,
    **__: Any,
) -> int:
    """Each step discretised: by exponentials of complex numbers, or by Woodbury's identity."""
    (batch, L, H), N, r = u, Lambda[1], P[0]
    mode = 118 if discretization == "zoh" else 29 + (10 + 8 * r + 2 * r * r if r else 0)
    return batch * L * H * (N // 2 * mode + 2)


def of_varying_backward(
    grads: Sequence[Shape],
    inputs: Sequence[Shape],
    resets: Shape | None,
    positions: Shape,
    discretization: str,
    *_: Any,
    **__: Any,
) -> int:
    """Twice the states again, then the way back."""
    (batch, L, H), N, r = inputs[0], inputs[3][1], inputs[4][0]
    mode = 180 if discretization == "zoh" else 48 + (6 + 18 * r if r else 0)
    u, rate, x, Lambda, P, B, C, D, dt = inputs
    again = of_varying(u, rate, x, Lambda, P, B, C, D, dt, resets, positions, discretization)
    return 2 * again + batch * L * H * N // 2 * mode


_FORMULAS: dict[str, Any] = {
    "scan": of_scan,
    "states": of_states,
    "states_backward": of_states_backward,
    "scan_backward": of_scan_backward,
    "maps": of_maps,
    "maps_backward": of_maps_backward,
    "power": of_power,
    "power_backward": of_power_backward,
    "response": of_response,
    "response_backward": of_response_backward,
    "cauchy": of_cauchy,
    "cauchy_backward": of_cauchy_backward,
    "step": of_step,
    "step_kept": of_step_kept,
    "varying": of_varying,
    "varying_backward": of_varying_backward,
}
for name, formula in _FORMULAS.items():
    register_flop_formula(getattr(torch.ops.s4, name))(formula)
