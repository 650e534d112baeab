"""A recurrence whose step of time differs from input to input: irregular sampling.

    x_t = Abar(dt rate_t) x_{t-1} + Bbar(dt rate_t) u_t,    y_t = C x_t + D u_t

with Abar and Bbar by the discretisation of the system. As no two steps are alike, there is neither a kernel
nor a map of a chunk: each step takes O(N), in double precision. For the gradient no states are kept: they are
computed again.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from s4.ops import dispatch, step
from s4.precision import WITHOUT_FLOAT64
from s4.system import Recurrence, System, discretize, modes, readout, stack

_RANK = 2  # of A, at most, that backends are written for
_FUSED = ("bilinear", "zoh")  # discretisations that they are written for
_CHUNK = 16, 256  # steps at a time of the plain definition: about sqrt(L), between these
_STATES = {"cpu": 1 << 19}  # numbers in the states of its chunk, at most, by type of device
_CHANNELS = (2, None, 1, 0, 1, 0, 0, 0, 0)  # which dimension of an operand they are


def varying(
    system: System,
    D: Float[Tensor, "H"],
    u: Float[Tensor, "B L H"],
    rate: Float[Tensor, "B L"],
    x: Float[Tensor, "B H N"] | None = None,
    resets: Bool[Tensor, "B L"] | None = None,
    positions: Int[Tensor, "B P"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B P H N"] | None]:
    """Outputs, and the states after chosen inputs; neither numbers nor gradients pass a reset.

    With a second row C also backward in time, over the same gaps, as dt rate_t lies between inputs t-1 and t:
    from w = 0 on, for t = L-1, ..., 1, w = Abar(dt rate_t) w + Bbar(dt rate_t) u_t and y_{t-1} += C_1 w.

    Args:
        system: in double precision, on the device of u. For a device without float64 on the CPU, where all is
            then computed.
        D: what an input adds to its own output.
        u: inputs, float32 or float64.
        rate: above 0 and finite; dt rate_t is the time that passes before input t.
        x: the state before the first input; None is zero.
        resets: the state is zero before the input at a True.
        positions: of the inputs after which states are wanted, -1 for x itself; in any order, also repeated.
        backend: who computes, "auto" or one of `s4.kernel.backends()`.

    Returns:
        y and the states in the dtype of u; None instead of the states without positions.
    """
    if u.device.type in WITHOUT_FLOAT64:
        given = [None if t is None else t.cpu() for t in (D, u, rate, x, resets, positions)]
        y, states = varying(system, *given, backend)  # type: ignore[arg-type, call-arg]
        return y.to(u.device), None if states is None else states.to(u.device)
    batch, L, H = u.shape
    Lambda, P, B, C, dt, discretization = system
    shared = stack(Lambda), stack(P), stack(B)  # real, as a compiler knows no complex numbers
    rows, through, time = readout(C), D.double(), rate.double()
    rest = u.new_zeros(batch, H, rows.shape[-1])
    nowhere = torch.empty(batch, 0, dtype=torch.long, device=u.device)
    run: Callable[..., tuple[Tensor, Tensor]] = plain if dispatch.transformed() else operator
    options = discretization, backend
    before = rest if x is None else x.to(u.dtype)
    at = nowhere if positions is None else positions
    y, states = run(u, time, before, *shared, rows[0], through, dt, resets, at, *options)
    if len(rows) == 2:
        # Rolled, not cut by one: a graph has no lengths but L.
        last = (torch.arange(L, device=u.device) == L - 1).expand(batch, L)
        later, ends = u, last
        if resets is not None:
            later = torch.where(resets[..., None], 0, later)  # no output sees the first input of a segment
            ends = last | resets.roll(-1, 1)
        nothing, cut = torch.zeros_like(through), None if resets is None else ends.flip(1)
        seen, _ = run(
            later.flip(1), time.flip(1), rest, *shared, rows[1], nothing, dt, cut, nowhere, *options
        )
        y = y + torch.where(ends[..., None], 0, seen.flip(1).roll(-1, 1))
    return y, None if positions is None else states


def plain(
    u: Tensor,
    rate: Tensor,
    x: Tensor,
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt: Tensor,
    resets: Tensor | None,
    positions: Tensor,
    discretization: str,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H) and states (B, P, H, N) of one direction, chunk after chunk of steps.

    u (B, L, H), rate (B, L) and the state x (B, H, N) before; of the system real Lambda and B (H, N) and
    P (r, H, N), the real, then the imaginary parts, the row C (H, N) that maps a state to an output, D and dt
    (H,); resets (B, L) and positions (B, P). All float64, but u and x may be float32, and so the results are.
    """
    shared = Lambda, P, B, C, D, dt
    outputs = [u[:, :0]]
    state = x.double()
    states = torch.where((positions < 0)[..., None, None], state[:, None], 0)
    for start, stop in _chunks(u.shape[1]):
        options = _slice(resets, start, stop), positions - start, discretization
        y, state, found = _chunk(u[:, start:stop], rate[:, start:stop], state, *shared, *options)
        outputs.append(y)
        states = states + found
    return torch.cat(outputs, 1), states.to(u.dtype)


def plain_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    resets: Tensor | None,
    positions: Tensor,
    discretization: str,
) -> list[Tensor]:
    """Gradients of the nine real inputs of `plain`, which holds the states of one chunk at a time."""
    u, rate, x, *shared = inputs
    of_y, of_states = grads[0], grads[1].double()
    state = x.double()
    borders, parts = [], []
    for start, stop in _chunks(u.shape[1]):
        run = partial(
            _chunk,
            resets=_slice(resets, start, stop),
            positions=positions - start,
            discretization=discretization,
        )
        parts.append((run, start, stop))
        borders.append(state)
        state = run(u[:, start:stop], rate[:, start:stop], state, *shared)[1]
    of_state, of_shared = torch.zeros_like(state), [torch.zeros_like(p) for p in shared]
    of_u, of_rate = torch.zeros_like(u), torch.zeros_like(rate)
    while parts:
        run, start, stop = parts.pop()
        back = torch.func.vjp(run, u[:, start:stop], rate[:, start:stop], borders.pop(), *shared)[1]
        found = back((of_y[:, start:stop], of_state, of_states))
        of_u[:, start:stop], of_rate[:, start:stop], of_state = found[:3]
        for total, part in zip(of_shared, found[3:], strict=True):
            total += part
    of_x = of_state + torch.where((positions < 0)[..., None, None], of_states, 0).sum(1)
    return [of_u, of_rate, of_x.to(x.dtype), *of_shared]


def _chunks(L: int) -> list[tuple[int, int]]:
    """Where chunks start and stop, their length a power of two."""
    least, most = _CHUNK
    T = least
    while most > T and T * T < L:
        T *= 2
    return [(start, min(start + T, L)) for start in range(0, L, T)]


def _slice(resets: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if resets is None else resets[:, start:stop]


def _chunk(
    u: Tensor,
    rate: Tensor,
    x: Tensor,
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt: Tensor,
    resets: Tensor | None,
    positions: Tensor,
    discretization: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y of a chunk, the state after it, and those after positions counted from its start; zero for others."""
    (batch, T, H), N, r = u.shape, Lambda.shape[-1], len(P)

    def each(p: Tensor) -> Tensor:
        return modes(p)[..., None, None, :, :].expand(*p.shape[:-2], batch, T, H, N // 2).flatten(-4, -2)

    # A system for each step.
    times = (rate[..., None] * dt).flatten()
    systems = System(each(Lambda), each(P), each(B), each(C[None])[:0], times, discretization)
    a, F, G, Bbar, _ = discretize(systems)
    a, Bbar = a.view(batch, T, H, N), Bbar.view(batch, T, H, N)
    F, G = F.view(r, batch, T, H, N), G.view(r, batch, T, H, N)
    inputs = u.double()
    starts = None if resets is None else resets[..., None, None]
    if r == 0:
        X = _diagonal(modes(a), modes(Bbar * inputs[..., None]), modes(x), starts)
    else:
        X = _stepwise(a, F, G, Bbar, inputs, x, starts)
    y = torch.einsum("bthn,hn->bth", X, C) + D * inputs
    at = positions[..., None, None]
    found = X.gather(1, at.clamp(0, T - 1).expand(*positions.shape, H, N))
    return y.to(u.dtype), X[:, -1], torch.where((at >= 0) & (at < T), found, 0)


def _stepwise(
    a: Tensor, F: Tensor, G: Tensor, Bbar: Tensor, u: Tensor, x: Tensor, starts: Tensor | None
) -> Tensor:
    """States after each input, one after the other."""
    none = u.new_zeros(u.shape[2])
    states = []
    for t in range(u.shape[1]):
        if starts is not None:
            x = torch.where(starts[:, t], 0, x)
        here = Recurrence(a[:, t], F[:, :, t], G[:, :, t], Bbar[:, t], a[None, :, t])
        _, x = step.plain(here, none, x, u[:, t])
        states.append(x)
    return torch.stack(states, 1)


def _diagonal(a: Tensor, driven: Tensor, x: Tensor, starts: Tensor | None) -> Tensor:
    """States after each input, of complex diagonal systems: an associative scan (Hillis and Steele, 1986).

    After the passes over d = 1, 2, 4, ... a and X are those of up to 2d steps as one, from the last reset on.
    Numbers before a reset are replaced before they are multiplied, so that 0 times infinity is nowhere.
    """
    if starts is not None:
        x = torch.where(starts[:, 0], 0, x)
    X = torch.cat([driven[:, :1] + a[:, :1] * x[:, None], driven[:, 1:]], 1)
    d = 1
    while d < X.shape[1]:
        earlier_a, earlier_X = a[:, :-d], X[:, :-d]
        if starts is not None:
            earlier_a = torch.where(starts[:, d:], 1, earlier_a)
            earlier_X = torch.where(starts[:, d:], 0, earlier_X)
            starts = torch.cat([starts[:, :d], starts[:, d:] | starts[:, :-d]], 1)
        X = torch.cat([X[:, :d], X[:, d:] + a[:, d:] * earlier_X], 1)
        a = torch.cat([a[:, :d], a[:, d:] * earlier_a], 1)
        d *= 2
    return stack(X)


def _blocks(operands: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """The operands of a few channels at a time, as a chunk takes some 200 times the memory of its states."""
    (batch, L, H), N = operands[0].shape, operands[3].shape[1]
    longest = max((stop - start for start, stop in _chunks(L)), default=1)
    most = _STATES.get(operands[0].device.type, 1 << 21)
    h = max(1, most // max(1, batch * longest * N))
    for start in range(0, H, h):
        size = min(h, H - start)
        each = zip(operands, _CHANNELS, strict=True)
        part = [t if dim is None else t.narrow(dim, start, size) for t, dim in each]
        yield slice(start, start + size), part


def _blockwise(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`plain`, block by block of channels."""
    operands, options = arguments[:9], arguments[9:]
    run: Callable[..., Any] = plain
    y, states = zip(*(run(*part, *options) for _, part in _blocks(operands)), strict=True)
    return torch.cat(y, -1), torch.cat(states, 2)


def _blockwise_backward(grads: Sequence[Tensor], operands: Sequence[Tensor], *options: Any) -> list[Tensor]:
    """`plain_backward`, block by block of channels."""
    of_y, of_states = grads
    found = [
        plain_backward([of_y[..., here], of_states[:, :, here]], part, *options)
        for here, part in _blocks(operands)
    ]
    joined = zip(_CHANNELS, zip(*found, strict=True), strict=True)
    return [torch.stack(parts).sum(0) if dim is None else torch.cat(parts, dim) for dim, parts in joined]


def _checked(
    inputs: Sequence[Tensor], resets: Tensor | None, positions: Tensor
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """As a backend reads them, contiguous; raises unless they are what it reads raw memory as."""
    u, rate, _, Lambda, P, *_ = inputs
    (batch, L, H), N, r = u.shape, Lambda.shape[-1], len(P)
    shapes: list[Any] = [
        (batch, L, H),
        (batch, L),
        (batch, H, N),
        (H, N),
        (r, H, N),
        (H, N),
        (H, N),
        (H,),
        (H,),
    ]
    fits = [t.shape for t in inputs] == shapes and N % 2 == 0
    fits = fits and positions.shape == (batch, *positions.shape[1:2]) and positions.dtype == torch.long
    fits = fits and (resets is None or (resets.shape == rate.shape and resets.dtype == torch.bool))
    kinds = [u.dtype if i in (0, 2) else torch.float64 for i in range(9)]
    everything = [*inputs, positions, *([] if resets is None else [resets])]
    if not fits or [t.dtype for t in inputs] != kinds or {t.device for t in everything} != {u.device}:
        given = [(tuple(t.shape), t.dtype, str(t.device)) for t in everything]
        raise ValueError(
            f"need operands of shapes {shapes}, positions (B, P) of int64 and resets (B, L) of bool, N even, "
            f"u and x of one dtype, the others of float64, on one device, got {given}"
        )
    read = [dispatch.plain_memory(t) for t in inputs]
    return read, None if resets is None else resets.contiguous(), positions.contiguous()


def _module(backend: str, P: Tensor, discretization: str) -> Any | None:
    module = dispatch.implementation("varying", backend, P.device)
    return module if len(P) <= _RANK and discretization in _FUSED else None


@torch.library.custom_op("s4::varying", mutates_args=())
def operator(
    u: Tensor,
    rate: Tensor,
    x: Tensor,
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt: Tensor,
    resets: Tensor | None,
    positions: Tensor,
    discretization: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    operands, resets, positions = _checked((u, rate, x, Lambda, P, B, C, D, dt), resets, positions)
    module = _module(backend, P, discretization)
    run: Callable[..., Any] = _blockwise if module is None else module.varying
    y, states = run(*operands, resets, positions, discretization)
    return y.contiguous(), states.contiguous()


@torch.library.custom_op("s4::varying_backward", mutates_args=())
def operator_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    resets: Tensor | None,
    positions: Tensor,
    discretization: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of u, rate, x, Lambda, P, B, C, D and dt."""
    operands, resets, positions = _checked(inputs, resets, positions)
    u, x = operands[0], operands[2]
    shapes: list[Any] = [u.shape, (*positions.shape, *x.shape[1:])]
    if [g.shape for g in grads] != shapes or {(g.dtype, g.device) for g in grads} != {(u.dtype, u.device)}:
        raise ValueError(f"need gradients {shapes} as u, got {[(tuple(g.shape), g.dtype) for g in grads]}")
    grads = [dispatch.plain_memory(g) for g in grads]
    module = _module(backend, inputs[4], discretization)
    run: Callable[..., Any] = _blockwise_backward if module is None else module.varying_backward
    return [g.contiguous() for g in run(grads, operands, resets, positions, discretization)]


@operator.register_fake
def _(u: Tensor, rate: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    positions = others[-3]
    return u.new_empty(u.shape), u.new_empty(*positions.shape, *x.shape[1:])


@operator_backward.register_fake
def _(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    resets: Tensor | None,
    positions: Tensor,
    discretization: str,
    backend: str,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs]


def _save(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.discretization, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    *inputs, resets, positions = ctx.saved_tensors
    rest = resets, positions, ctx.discretization
    if dispatch.recorded(*grads):
        run = partial(plain, resets=resets, positions=positions, discretization=ctx.discretization)
        found: Sequence[Tensor | None] = dispatch.through(run, inputs, grads)
    else:
        found = operator_backward(list(grads), inputs, *rest, ctx.backend)
    return *found, None, None, None, None


operator.register_autograd(_gradients, setup_context=_save)
