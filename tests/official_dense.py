"""What the original repository computes of its parameters, by their names, dense and in float64.

Written from the papers and from its own description of its parameters: loops of numpy, nothing of s4 or of
the original. `official_parameters.py` makes files of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]


class Systems(NamedTuple):
    """x_l = A x_{l-1} + B u_l, y_l = Re(C x_l) + D u_l of each channel, over modes and their conjugates."""

    A: Array  # (H, 2 N, 2 N)
    B: Array  # (H, 2 N)
    C: Array  # (directions, H, 2 N)
    D: Array  # (H,)


TRANSFORMS: dict[str, Callable[[Array], Array]] = {
    "none": lambda p: p,
    "exp": np.exp,
    "relu": lambda p: np.maximum(p, 0) + 1e-4,
    "sigmoid": lambda p: 1 / (1 + np.exp(-p)),
    "softplus": lambda p: np.log1p(np.exp(p)),
}
INVERSE: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "exp": np.log,
    "relu": lambda x: x - 1e-4,
    "sigmoid": lambda x: np.log(x / (1 - x)),
    "softplus": lambda x: np.log(np.expm1(x)),
}


def pair(p: Array) -> Array:
    """(..., 2) to complex."""
    return p[..., 0] + 1j * p[..., 1]


def both(p: Array) -> Array:
    """A number for each mode, then for its conjugate."""
    return np.concatenate([p, np.conj(p)], -1)


def systems(p: Mapping[str, Array], discretization: str, **transforms: str) -> Systems:
    """Of a layer of version 4, by the names of its FFTConv."""
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    dt = TRANSFORMS[transforms.get("dt", "exp")](p["kernel.inv_dt"])
    real = TRANSFORMS[transforms.get("real", "exp")](p["kernel.A_real"])
    S = len(real)
    if "kernel.A_imag" in p:
        a = -real - 1j * TRANSFORMS[transforms.get("imag", "none")](p["kernel.A_imag"])
        B, C = pair(p["kernel.B"])[0], pair(p["kernel.C"])
    else:
        a, B, C = -real + 0j, p["kernel.B"][0], p["kernel.C"]
    low_rank = pair(p["kernel.P"]) if "kernel.P" in p else np.zeros((0, S, a.shape[1]))
    channels, n = len(dt), a.shape[1]
    Abar, Bbar = np.zeros((channels, 2 * n, 2 * n), complex), np.zeros((channels, 2 * n), complex)
    rows = np.zeros((len(C), channels, 2 * n), complex)
    for h in range(channels):
        s = h % S  # which of the S systems
        step = np.diag(both(np.broadcast_to(dt[h], (n,))))
        A = np.diag(both(a[s]))
        for P in low_rank[:, s]:
            A = A - np.outer(both(P), np.conj(both(P)))
        A, b = step @ A, step @ both(B[s])
        if discretization == "bilinear":
            left = np.eye(2 * n) - A / 2
            Abar[h], Bbar[h] = np.linalg.solve(left, np.eye(2 * n) + A / 2), np.linalg.solve(left, b)
        else:
            z = np.diag(A)
            Abar[h], Bbar[h] = np.diag(np.exp(z)), (np.exp(z) - 1) / z * b
        length = int(p.get("kernel.l_kernel", 0))
        # What is stored is C (I - Abar^length); of length 0, C.
        undo = np.eye(2 * n) - (np.linalg.matrix_power(Abar[h], length) if length else 0)
        for c in range(len(C)):
            rows[c, h] = np.linalg.solve(undo.T, both(C[c, h]))
    return Systems(Abar, Bbar, rows, p["D"][0])


def run(s: Systems, u: Array) -> tuple[Array, Array, Array]:
    """Outputs (B, L, H), kernels (directions, H, length) and the state (B, H, 2 N): real, imaginary parts.

    The second row of C is of the other direction: y_l takes sum over j of C A^j B u_{l+1+j}.
    """
    length = u.shape[1]
    kernel = np.zeros((len(s.C), len(s.B), length))
    x = s.B.copy()
    for t in range(length):
        kernel[:, :, t] = np.einsum("chn,hn->ch", s.C, x).real
        x = np.einsum("hmn,hn->hm", s.A, x)
    y = u * s.D
    for t in range(length):
        past = kernel[0, :, : t + 1][:, ::-1]
        y[:, t] += np.einsum("hj,bjh->bh", past, u[:, : t + 1])
        if len(kernel) == 2:
            y[:, t] += np.einsum("hj,bjh->bh", kernel[1, :, : length - t - 1], u[:, t + 1 :])
    state = np.zeros((len(u), *s.B.shape), complex)
    for t in range(length):
        state = np.einsum("hmn,bhn->bhm", s.A, state) + s.B * u[:, t, :, None]
    half = state[..., : s.B.shape[1] // 2]
    return y, kernel, np.concatenate([half.real, half.imag], -1)


def gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def linear(p: Mapping[str, Array], name: str, x: Array) -> Array:
    """x (..., d) by `name`.weight, also that of a convolution of size 1, or with a weight norm."""
    if f"{name}.weight_g" in p:
        v = p[f"{name}.weight_v"].astype(np.float64)
        weight = p[f"{name}.weight_g"] * v / np.sqrt((v**2).sum(1, keepdims=True))
    else:
        weight = p[f"{name}.weight"].astype(np.float64)
    return x @ weight.reshape(len(weight), -1).T + p[f"{name}.bias"].reshape(-1)


def mixed(p: Mapping[str, Array], name: str, x: Array) -> Array:
    """An output map: a gated linear unit if it has twice the width."""
    z = linear(p, name, x)
    if z.shape[-1] == x.shape[-1]:
        return z
    value, gate = np.split(z, 2, -1)
    return value / (1 + np.exp(-gate))


def norm(p: Mapping[str, Array], name: str, x: Array) -> Array:
    """Layer norm, or batch norm in evaluation."""
    p = {key: value.astype(np.float64) for key, value in p.items() if key.startswith(name)}
    if f"{name}.running_mean" in p:
        mean, variance = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    else:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def residual(x: Array, f: Callable[[Array], Array], n: Callable[[Array], Array], prenorm: bool) -> Array:
    return x + f(n(x)) if prenorm else n(x + f(x))


def inner(p: Mapping[str, Array], prefix: str, x: Array) -> Array:
    """An original S4Block without gates, of a DPLR layer."""
    own = {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}
    of_layer = {
        name.removeprefix("layer."): value for name, value in own.items() if name.startswith("layer.")
    }
    kind = "bilinear" if "kernel.P" in of_layer else "zoh"
    return mixed(own, "output_linear.0", gelu(run(systems(of_layer, kind), x)[0]))
