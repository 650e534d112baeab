"""The slow truth the library is measured against: dense float64 systems, plain loops, direct sums.

Nothing here is shared with the library, and nothing is clever. Everything is torch float64 so that
autograd through the loops gives the true gradients as well.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Continuous(NamedTuple):
    """x' = A x + B u, y = C x + D u in real coordinates (Re x, Im x), one system a channel."""

    A: Tensor  # (H, N, N)
    B: Tensor  # (H, N)
    C: Tensor  # (directions, H, N)
    D: Tensor  # (H,)
    dt: Tensor  # (H,)


class Discrete(NamedTuple):
    """x_l = A x_{l-1} + B u_l, y_l = C x_l + D u_l."""

    A: Tensor  # (H, N, N)
    B: Tensor  # (H, N)
    C: Tensor  # (directions, H, N)
    D: Tensor  # (H,)


def complex128(pair: Tensor) -> Tensor:
    """(..., 2) real -> (...) complex128."""
    pair = pair.double()
    return torch.complex(pair[..., 0], pair[..., 1])


def continuous(parameters: Mapping[str, Tensor]) -> Continuous:
    """The dense real system that a layer's parameters stand for.

    The complex system has the state (x, conj x), A = diag(Lambda, conj Lambda) - sum_r p_r p_r^* with
    p_r = (P_r, conj P_r), and the rows (C, conj C); (x, conj x) = T (Re x, Im x).
    """
    H = parameters["D"].shape[0]
    half = torch.complex(-parameters["log_A_real"].double().exp(), parameters["A_imag"].double())
    n_ssm, n = half.shape
    A = torch.diag_embed(torch.cat([half, half.conj()], -1))
    for P in complex128(parameters["P"]) if "P" in parameters else ():
        p = torch.cat([P, P.conj()], -1)
        A = A - p[:, :, None] * p.conj()[:, None, :]
    B = complex128(parameters["B"])
    C = complex128(parameters["C"])
    eye = torch.eye(n, dtype=torch.complex128)
    T = torch.cat([torch.cat([eye, 1j * eye], 1), torch.cat([eye, -1j * eye], 1)], 0)
    A = torch.linalg.inv(T) @ A @ T
    B = torch.cat([B, B.conj()], -1) @ torch.linalg.inv(T).T
    C = torch.cat([C, C.conj()], -1) @ T
    ssm = torch.arange(H) // (H // n_ssm)
    return Continuous(
        A.real[ssm], B.real[ssm], C.real, parameters["D"].double(), parameters["log_dt"].double().exp()
    )


def discretise(A: Tensor, B: Tensor, dt: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """(H, N, N), (H, N), (H,) -> the same for the recurrence; checked against scipy in test_oracle."""
    H, N = B.shape
    step = dt[:, None, None]
    if method == "bilinear":
        left = torch.eye(N, dtype=A.dtype) - step / 2 * A
        right = torch.cat([torch.eye(N, dtype=A.dtype) + step / 2 * A, step * B[:, :, None]], -1)
        both = torch.linalg.solve(left, right)
    else:
        # B as large as A: what an exponential loses is relative to the largest of the two.
        scale = ((A.abs().amax((1, 2)) + 1e-30) / (B.abs().amax(1) + 1e-30)).detach()[:, None, None]
        block = torch.cat([A, scale * B[:, :, None]], -1)
        block = torch.cat([block, torch.zeros(H, 1, N + 1, dtype=A.dtype)], 1)
        both = exponential(step * block)[:, :N]
        both = torch.cat([both[:, :, :N], both[:, :, N:] / scale], -1)
    return both[:, :, :N], both[:, :, N]


def exponential(M: Tensor) -> Tensor:
    """e^M of each of (H, N, N), by Taylor's series of M / 2^k, its norm at most 1, then k squarings.

    The gradient of torch.linalg.matrix_exp loses the digits of M where the gradient that comes in is large.
    """
    k = M.detach().abs().sum(-1).amax(-1).clamp(min=1).log2().ceil()[:, None, None]
    term = E = torch.eye(M.shape[-1], dtype=M.dtype).expand(M.shape)
    for i in range(1, 21):
        term = term @ M / (i * 2**k)
        E = E + term
    for i in range(int(k.max())):
        E = torch.where(i < k, E @ E, E)
    return E


def discrete(parameters: Mapping[str, Tensor], method: str, rate: float = 1.0) -> Discrete:
    A, B, C, D, dt = continuous(parameters)
    return Discrete(*discretise(A, B, dt * rate, method), C, D)


def recurrence(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u (batch, L, H), C (H, N), state (batch, H, N) -> y (batch, L, H), last state."""
    u = u.double()
    x = torch.zeros(u.shape[0], *B.shape, dtype=torch.float64) if state is None else state.double()
    y = [torch.zeros_like(u[:, :0])]
    for t in range(u.shape[1]):
        x = torch.einsum("hnm,bhm->bhn", A, x) + B * u[:, t, :, None]
        y.append(((C * x).sum(-1) + D * u[:, t])[:, None])
    return torch.cat(y, 1), x


def forward(system: Discrete, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The layer as loops. The second direction sees the inputs strictly after t, the nearest one first."""
    A, B, C, D = system
    y, x = recurrence(A, B, C[0], D, u, state)
    if len(C) == 2:
        backward, _ = recurrence(A, B, C[1], torch.zeros_like(D), u.flip(1))
        later = backward.flip(1)[:, 1:]
        y = y + torch.cat([later, torch.zeros_like(y[:, :1])], 1)[:, : u.shape[1]]
    return y, x


def varying(
    system: Continuous,
    method: str,
    u: Tensor,
    rate: Tensor,
    state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """With the time dt rate[b, t] before input t: y (batch, L, H), states (batch, L+1, H, N).

    The state is zero before the input at a reset, and so is, backward in time, the one of the next segment.
    """
    batch, L, H = u.shape
    A, B, C, D, dt = system
    N = B.shape[1]
    if batch * L == 0:
        start = torch.zeros(batch, H, N, dtype=torch.float64) if state is None else state.double()
        return u.double(), start[:, None].expand(batch, L + 1, H, N)
    steps = (rate.double()[..., None] * dt).reshape(-1)
    every = [p.expand(batch, L, *p.shape).reshape(-1, *p.shape[1:]) for p in (A, B)]
    A, B = discretise(every[0], every[1], steps, method)
    A, B, u = A.view(batch, L, H, N, N), B.view(batch, L, H, N), u.double()
    none = torch.zeros(H, N, dtype=torch.float64)
    outputs, states = [], []
    for b in range(batch):
        x = none if state is None else state[b].double()
        y, after = [], [x]
        for t in range(L):
            if resets is not None and resets[b, t]:
                x = none
            x = (A[b, t] @ x[..., None])[..., 0] + B[b, t] * u[b, t, :, None]
            y.append((C[0] * x).sum(-1) + D * u[b, t])
            after.append(x)
        w = none
        for t in range(L - 1, 0, -1) if len(C) == 2 else ():
            if resets is not None and t + 1 < L and resets[b, t + 1]:
                w = none
            w = (A[b, t] @ w[..., None])[..., 0] + B[b, t] * u[b, t, :, None]
            if resets is None or not resets[b, t]:
                y[t - 1] = y[t - 1] + (C[1] * w).sum(-1)
        outputs.append(torch.stack(y))
        states.append(torch.stack(after))
    return torch.stack(outputs), torch.stack(states)


def kernel(system: Discrete, L: int) -> Tensor:
    """K_l = C A^l B, (directions, H, L), by a plain loop."""
    A, B, C, _ = system
    x, K = B, [torch.zeros(*C.shape[:2], 0, dtype=torch.float64)]
    for _ in range(L):
        K.append((C * x).sum(-1)[..., None])
        x = torch.einsum("hnm,hm->hn", A, x)
    return torch.cat(K, -1)


def long_kernel(system: Discrete, L: int) -> Tensor:
    """The same by doubling, [X, A^|X| X], one channel at a time: for L in the tens of thousands."""
    A, B, C, _ = system
    rows = []
    for h in range(len(B)):
        X, power = B[h][:, None], A[h]
        while X.shape[1] < L:
            X = torch.cat([X, power @ X], 1)
            power = power @ power
        rows.append(C[:, h] @ X[:, :L])
    return torch.stack(rows, 1)


def convolve(u: np.ndarray, forward: np.ndarray, backward: np.ndarray | None = None) -> np.ndarray:
    """y_t = sum_{j<=t} K_f[t-j] u_j + sum_{j>t} K_b[j-t-1] u_j along the last axis, (..., H, L), (H, K)."""
    L = u.shape[-1]
    y = np.zeros(u.shape, dtype=np.float64)
    for t in range(L):
        for j in range(L):
            if j <= t and t - j < forward.shape[-1]:
                y[..., t] += forward[:, t - j] * u[..., j]
            if j > t and backward is not None and j - t - 1 < backward.shape[-1]:
                y[..., t] += backward[:, j - t - 1] * u[..., j]
    return y


def cauchy(v: np.ndarray, z: np.ndarray, w: np.ndarray) -> np.ndarray:
    """sum over n of v/(z-w) + conj(v)/(z-conj(w)), (..., n), (..., l), (..., n) -> (..., l)."""
    v, z, w = (np.asarray(a, np.clongdouble)[..., None, :] for a in (v, z, w))
    z = np.swapaxes(z, -1, -2)
    return (v / (z - w) + v.conj() / (z - w.conj())).sum(-1).astype(np.complex128)


def cauchy_gradients(g: np.ndarray, v: np.ndarray, z: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    """Of the same in v, z and w, for a gradient g: (G, q, l), (G, q, n), (1 or G, l), (G, n)."""
    groups = z.shape[0]
    g, v, z, w = (np.asarray(a, np.clongdouble) for a in (g, v, z, w))
    R, S = (1 / (z[:, None] - pole[:, :, None]) for pole in (w, w.conj()))  # (G, n, l)
    grad_v = np.einsum("gql,gnl->gqn", g, R.conj()) + np.einsum("gql,gnl->gqn", g.conj(), S)
    at_pole = np.einsum("gql,gnl->gqn", g, R.conj() ** 2) + np.einsum("gql,gnl->gqn", g.conj(), S**2)
    at_node = np.einsum("gqn,gnl->gql", v, R**2) + np.einsum("gqn,gnl->gql", v.conj(), S**2)
    grad_z = -(g * at_node.conj()).sum(1)
    grad_z = grad_z if groups == grad_z.shape[0] else grad_z.sum(0, keepdims=True)
    return [a.astype(np.complex128) for a in (grad_v, grad_z, (v.conj() * at_pole).sum(1))]


def cauchy_sizes(g: np.ndarray, v: np.ndarray, z: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    """Of `cauchy` and its gradients in v, z and w: the same sums of the absolute values of their terms."""
    groups = z.shape[0]
    g, v = abs(g.astype(np.complex128)), abs(v.astype(np.complex128))
    z, w = (a.astype(np.complex128) for a in (z, w))
    R, S = (1 / abs(z[:, None] - pole[:, :, None]) for pole in (w, w.conj()))  # (G, n, l)
    out, grad_v = v @ (R + S), g @ (R + S).swapaxes(1, 2)
    squares = R**2 + S**2
    grad_z, grad_w = (g * (v @ squares)).sum(1), (v * (g @ squares.swapaxes(1, 2))).sum(1)
    return [out, grad_v, grad_z if groups == grad_z.shape[0] else grad_z.sum(0, keepdims=True), grad_w]


def vandermonde(v: np.ndarray, x: np.ndarray, L: int) -> np.ndarray:
    """2 Re sum over n of v exp(x l), (..., n), (..., n) -> (..., L)."""
    v, x = (np.asarray(a, np.clongdouble)[..., None, :] for a in (v, x))
    return 2 * (v * np.exp(x * np.arange(L)[:, None])).sum(-1).real.astype(np.float64)


def vandermonde_gradients(g: np.ndarray, v: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    """Of the same in v and x, for a gradient g: (G, q, L), (G, q, n), (G, n)."""
    v, x = (np.asarray(a, np.clongdouble) for a in (v, x))
    steps = np.arange(g.shape[-1])
    E = np.exp(x[..., None] * steps)
    grad_v = 2 * np.einsum("gql,gnl->gqn", g, E).conj()
    grad_x = 2 * (v * np.einsum("gql,gnl->gqn", g, E * steps)).sum(1).conj()
    return [a.astype(np.complex128) for a in (grad_v, grad_x)]


def vandermonde_sizes(g: np.ndarray, v: np.ndarray, x: np.ndarray, power: int) -> list[np.ndarray]:
    """Of `vandermonde` and its gradients in v and x: the same sums of the absolute values of their terms.

    Each term counts |x l|^power times.
    """
    g, v, x = abs(g.astype(np.float64)), abs(v.astype(np.complex128)), x.astype(np.complex128)
    steps = np.arange(g.shape[-1])
    E = np.exp(x.real[..., None] * steps) * (abs(x)[..., None] * steps) ** power  # (G, n, L)
    grad_x = (v * (g @ (E * steps).swapaxes(1, 2))).sum(1)
    return [2 * (v @ E), 2 * (g @ E.swapaxes(1, 2)), 2 * grad_x]


def close(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    """|got - want| <= tolerance * max |want| everywhere, and the shapes are the same."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    dtype = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.detach().to(dtype), want.detach().to(dtype)
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= tolerance * max(scale, 1e-30), f"{what}: error {error:.2e}, largest value {scale:.2e}"
