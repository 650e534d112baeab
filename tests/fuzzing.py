"""What a random case is made of, and its truth: loops over time, in float64."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import oracle
import torch
from scipy.signal import cont2discrete
from torch import Tensor

RATES = (1.0, 0.3, 5.0)  # next to that of the case, of rates that are tensors


class Case(NamedTuple):
    """All that a case is made of; numbers come from the seed."""

    variant: str
    dtype: str
    seed: int
    init: str
    discretization: str
    d_state: int
    H: int
    n_ssm: int
    bidirectional: bool
    parameters: str  # of the initialisation, somewhat trained, or anything
    mode: str
    backend: str
    training: bool
    gradients: bool
    batch: int
    L: int
    rate: float
    times: str  # the kind of rate: a number, one for each of the rows, or of all steps
    way: str  # whole, chunks, steps
    state: bool
    lengths: bool
    resets: float  # how many of the inputs are one; -1 for none given
    loud: bool  # whether some segments are a million times louder than others
    positions: int  # of states wanted of each sequence
    layout: str
    input_dtype: str
    scale: int  # a power of ten


def by_scipy(case: Case, p: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A (N, N) and B (N,) of each channel, of the modes and their conjugates, as they act on (Re x, Im x)."""
    n = case.d_state // 2
    for h in range(case.H):
        s = h // (case.H // case.n_ssm)
        half = -np.exp(p["log_A_real"][s]) + 1j * p["A_imag"][s]
        A = np.diag(np.concatenate([half, half.conj()]))
        for P in p.get("P", np.zeros((0, case.n_ssm, n, 2)))[:, s] @ [1, 1j]:
            column = np.concatenate([P, P.conj()])
            A = A - np.outer(column, column.conj())
        B = p["B"][s] @ [1, 1j]
        scale = abs(A).max() / abs(B).max()  # an exponential's digits are those of its largest number
        system = A, scale * np.concatenate([B, B.conj()])[:, None], np.zeros((1, 2 * n)), np.zeros((1, 1))
        A, B, *_ = cont2discrete(system, np.exp(p["log_dt"][h]) * case.rate, case.discretization)
        own, other = A[:n, :n], A[:n, n:]  # of x, and of its conjugate
        re, im = own + other, own - other
        yield (
            np.block([[re.real, -im.imag], [re.imag, im.real]]),
            np.concatenate([B[:n].real, B[:n].imag])[:, 0] / scale,
        )


def states(A: Tensor, Bu: Tensor, x: Tensor, which: Tensor, cut: Tensor) -> Tensor:
    """x, A x + Bu_0, ...: (R, H, N, N), (L, H, N, B), (H, N, B) -> (L + 1, H, N, B).

    `which` (L, B) of the R matrices moves the state to an input; where `cut` (L, B), nothing does.
    """
    found, cuts = [x], cut.any(1).tolist()
    for Bu_t, which_t, cut_t, some in zip(Bu, which, cut, cuts, strict=True):
        x = torch.where(cut_t, 0, found[-1]) if some else found[-1]
        if len(A) == 1:
            found.append(torch.baddbmm(Bu_t, A[0], x))
        else:
            found.append((A @ x).gather(0, which_t.expand(1, *x.shape))[0] + Bu_t)
    return torch.stack(found)


class Inputs(NamedTuple):
    """In float64: u, the state or None, lengths (B,), resets (B, L), and which of the rates each step has."""

    u: Tensor
    x: Tensor | None
    lengths: Tensor
    resets: Tensor
    which: Tensor


class Truth(NamedTuple):
    """Outputs (B, L, H), states (B, L + 1, H, N), K (c, H, L); the sizes of the terms these add up."""

    y: Tensor
    states: Tensor
    K: Tensor
    K_size: Tensor
    y_size: Tensor
    state_size: Tensor


def largest(sizes: Tensor, segment: Tensor) -> Tensor:
    """The largest of (B, L, H) in the segment (B, L) of each."""
    index = segment[..., None].expand(sizes.shape)
    empty = sizes.new_zeros(len(sizes), sizes.shape[1] + 1, sizes.shape[2])
    return empty.scatter_reduce(1, index, sizes, "amax").gather(1, index)


def truth(systems: list[oracle.Discrete], given: Inputs) -> Truth:
    """A loop over time in float64; the second row of C sees the inputs strictly after its own."""
    A, B = (torch.stack([system[i] for system in systems]) for i in (0, 1))
    C, D = systems[0].C, systems[0].D
    u, x, lengths, resets, which = given
    batch, L, H = u.shape
    u = torch.where((torch.arange(L) < lengths[:, None])[..., None], u, 0.0)
    x = torch.zeros(batch, H, B.shape[-1], dtype=torch.float64) if x is None else x
    drive = (B[which] * u[..., None]).permute(1, 2, 3, 0)
    X = states(A, drive, x.permute(1, 2, 0), which.T, resets.T).permute(3, 0, 1, 2)
    y = (C[0] * X[:, 1:]).sum(-1) + D * u
    if len(C) == 2:
        later = torch.cat([resets[:, 1:], torch.ones(batch, 1, dtype=torch.bool)], 1)[:, :L]
        nothing = torch.zeros_like(x.permute(1, 2, 0))
        W = states(A, drive.flip(0), nothing, which.T.flip(0), later.T.flip(0)).permute(3, 0, 1, 2)
        seen = W.flip(1)[:, 1:]  # before the cut that lies behind each input
        y = y + torch.where(later[..., None], 0, (C[1] * seen).sum(-1))
    with torch.no_grad():
        K, K_size, V_size = zip(*(of_impulse(a, b, C, L) for a, b in zip(A, B, strict=True)), strict=True)
        segment = resets.cumsum(1)
        before = torch.where(resets[..., None, None], 0, X[:, :-1])
        loud, read, norm = (
            largest(t, segment)
            for t in (
                u.abs(),
                (C.abs().sum(0) * torch.maximum(before.abs(), X[:, 1:].abs())).sum(-1),
                torch.maximum(before.norm(dim=-1), X[:, 1:].norm(dim=-1)),
            )
        )
        y_size = (torch.stack(K_size).abs().sum((1, 3)).amax(0) + D.abs()) * loud + read
        state_size = torch.stack(V_size).amax(0) * loud + norm
        state_size = torch.cat([x.norm(dim=-1)[:, None], state_size], 1)[..., None]
    return Truth(y, X, K[0], K_size[0], y_size, state_size)


def of_impulse(A: Tensor, B: Tensor, C: Tensor, L: int) -> tuple[Tensor, Tensor, Tensor]:
    """K (c, H, L), what its terms add up to, and what those of a state do (H,)."""
    impulse = torch.zeros(L, *B.shape, 1, dtype=torch.float64)
    impulse[:1] = B[..., None]
    none = torch.zeros(L, 1, dtype=torch.long)
    V = states(A[None], impulse, torch.zeros_like(B)[..., None], none, none > 0)[1:, ..., 0]
    K_size = torch.einsum("chn,lhn->chl", C.abs(), V.abs())
    return torch.einsum("chn,lhn->chl", C, V), K_size, V.norm(dim=-1).sum(0)


def close(got: Tensor, want: Tensor, bound: Tensor | float, what: str) -> None:
    """|got - want| <= bound everywhere, beside what rounding to the dtype of `got` may cost; finite."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    kind = torch.finfo(got.dtype)
    error = (got.detach().double() - want).abs()
    excess = error - bound - kind.eps * want.abs() - kind.tiny
    if not bool((excess <= 0).all()):
        worst = excess.nan_to_num(torch.inf).argmax()
        numbers = [
            float(t.expand_as(error).flatten()[worst]) for t in (got.detach(), want, torch.as_tensor(bound))
        ]
        raise AssertionError("{}: got {:.6e}, expected {:.6e} within {:.1e}".format(what, *numbers))
