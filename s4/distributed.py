"""A sequence longer than one device: each rank of a group has a contiguous piece of it.

Systems are linear: a piece runs from zero, and what the inputs of other pieces add comes by one state. With
S_r the state that the inputs of piece r leave, L_r its length and x_r the state before it,

    x_{r+1} = A^{L_r} x_r + S_r,   y_r[l] += C A^{l+1} x_r

and backward in time, with Z_r = sum over j of A^j B u_r[j] and z_r the same sum over all later inputs,

    z_r = A^{L_{r+1}} z_{r+1} + Z_{r+1},   y_r[l] += C_back A^{L_r - 1 - l} z_r

one power less, as that direction is strict. S and Z of all ranks are gathered at once; gradients are gathered
in the same way and go through the powers of the transposed A.
"""

import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from s4.checks import unread
from s4.ops import dispatch
from s4.ops.chunks import states
from s4.ops.ranks import FAR, Ring, Sum, Way, gathered, hand
from s4.ops.response import continuation, response
from s4.padding import padding, through_padded, zero_padding
from s4.sequence import sequence
from s4.system import discretize, system

__all__ = ["sequence_parallel"]

engaged = False  # once a `with` was entered: what layers, blocks and models ask before anything else
_open = 0  # how many are entered now
_idle = True  # none is, and no forward pass of one may be run again
_ring: ContextVar[tuple[Ring, bool] | None] = ContextVar("s4_sequence_parallel", default=None)
# What ran in a group, in evaluation without gradients: mostly to predict, or else in a reentrant checkpoint.
_unsaid: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# In which groups a module ran, or in none, where activation checkpointing may run it again: with what lives
# as long as that may happen, or True where that is not known.
_seen: weakref.WeakKeyDictionary[nn.Module, list[tuple[Any, Ring | None]]] = weakref.WeakKeyDictionary()


@contextmanager
def sequence_parallel(group: Any) -> Iterator[None]:
    """Inside, `S4Layer`, `S4Block` and `S4Model` take pieces of sequences, one a rank of the group.

    Rank r has the r-th piece (B, L_r, ...); L_r differs as it likes, also from call to call, and may be 0.
    All ranks make the same calls in the same order, with one batch size and the same weights. `lengths` and
    `state` are those of whole sequences, the same on every rank; `resets` are those of the piece; `rate` is a
    number. Outputs are those of the piece; pooled ones, and states, are the whole sequence's on every rank.

    Gradients are those of the sum of all ranks' losses. An input has all of its gradient; a parameter, or a
    `state` that was given, has a share on each rank, and their sum is its gradient. Every rank has to run
    backward through the outputs of every call. That may be outside the `with`, also where activation
    checkpointing runs a forward pass again.

    Args:
        group: a process group that this process belongs to, or a `DeviceMesh` of one dimension.

    Returns:
        a context manager.

    Raises:
        ValueError: torch.distributed is not initialised, the process is not in the group, or the mesh has
            several dimensions.
        TypeError: something other than a group.

    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # or by torchrun
        >>> piece = torch.randn(2, 1000, 16)  # of this rank
        >>> with sequence_parallel(dist.group.WORLD):
        ...     y = S4Layer(16)(piece)
        >>> y.shape
        torch.Size([2, 1000, 16])
        >>> dist.destroy_process_group()
    """
    global engaged, _open, _idle
    ring = _checked(group)
    engaged, _open, _idle = True, _open + 1, False
    token = _ring.set((ring, dispatch.recomputing()))
    try:
        yield
    finally:
        _ring.reset(token)
        _open -= 1
        held = [ring for seen in list(_seen.values()) for _, ring in _alive(seen)]
        _idle = not _open and held.count(None) == len(held)


def _checked(group: Any) -> Ring:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("sequence_parallel needs torch.distributed.init_process_group to be called before")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a mesh of one dimension, got {group}: take one by its name, mesh['sequence']"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a process group that this process belongs to, such as "
            f"torch.distributed.group.WORLD, or a DeviceMesh of one dimension, got {group!r}"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group must have this process as a member, but it has not")
    return Ring(group, rank, group.size())


def refuse(what: str) -> None:
    """Raise ValueError inside `sequence_parallel`, for what does not take a piece of a sequence."""
    if _ring.get() is not None:
        raise ValueError(
            f"{what} takes no piece of a sequence and cannot run inside sequence_parallel: call it outside; "
            "a state that forward returned inside is the whole sequence's on every rank"
        )


def packed(forward: Callable[..., Any], module: nn.Module, u: PackedSequence, *arguments: Any) -> Any:
    """`padding.through_padded`, of whole sequences: raises ValueError inside `sequence_parallel`."""
    if engaged:
        refuse("a call with a PackedSequence")
    return through_padded(forward, module, u, *arguments)


@dispatch.eager
def _exchanged(ring: Ring, shape: torch.Size, device: torch.device, call: str) -> list[int]:
    """The lengths of all ranks' pieces (B, L_r, ...), where all make the same call."""
    import torch.distributed as dist

    group, _, size = ring
    if "cpu:" in dist.get_backend_config(group):  # then a device need not be waited for
        device = torch.device("cpu")
    own = torch.tensor([shape[1], zlib.crc32(call.encode())], device=device)
    found = own.new_empty(size, 2)
    dist.all_gather(list(found), own, group)
    lengths, calls = found.t().tolist()
    if len(set(calls)) > 1:
        told: list[Any] = [None] * size
        dist.all_gather_object(told, call, group)
        lines = "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(told))
        raise ValueError(f"in sequence_parallel all ranks must make the same call, got{lines}")
    return list(map(int, lengths))


class Piece:
    """One call of a module inside `sequence_parallel`: where its rank's piece lies in the sequence.

    The lengths of the pieces are exchanged when they are first needed.
    """

    def __init__(self, ring: Ring, u: Tensor, call: str, cut: bool) -> None:
        self.ring, self.cut = ring, cut  # by resets, in any piece
        self._u_shape, self._device, self._call = u.shape, u.device, call

    @cached_property
    def sizes(self) -> list[int]:
        """The lengths of all pieces, in the order of ranks.

        Raises:
            ValueError: ranks that make different calls.
        """
        return _exchanged(self.ring, self._u_shape, self._device, self._call)

    @property
    def total(self) -> int:
        """The length of the whole sequence."""
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Inputs of the ranks before."""
        return sum(self.sizes[: self.ring.rank])

    def own(self, lengths: Tensor) -> Tensor:
        """Of the lengths (B,) of whole sequences, the part that lies in this piece."""
        return (lengths - self.offset).clamp(0, self.sizes[self.ring.rank])

    def sum(self, t: Tensor) -> Tensor:
        """The sum over the ranks, on all of them."""
        found: Tensor = Sum.apply(t, self.ring.group)
        return found

    def largest(self, t: Tensor) -> Tensor:
        """The largest of all ranks' numbers, on all of them."""
        import torch.distributed as dist

        t = t.clone()
        dist.all_reduce(t, dist.ReduceOp.MAX, group=self.ring.group)
        return t

    def last(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """The last of all positions, (B, H) on every rank, of x (B, L_r, H) and the lengths of the whole.

        Of a sequence without any the first, which is zero.
        """
        ends = torch.full(x.shape[:1], self.total, device=x.device) if lengths is None else lengths
        at = (ends - 1).clamp(min=0) - self.offset
        here = (at >= 0) & (at < x.shape[1])
        if x.shape[1] == 0:
            return self.sum(x.sum(1))
        found = x[torch.arange(x.shape[0], device=x.device), at.clamp(0, x.shape[1] - 1)]
        return self.sum(torch.where(here[:, None], found, 0))

    def shared(self, t: Tensor) -> Tensor:
        """The numbers that the first rank has, on all of them."""
        import torch.distributed as dist

        t = t.contiguous()
        dist.broadcast(t, group=self.ring.group, group_src=0)
        return t

    def batch_norm(self, norm: nn.BatchNorm1d, x: Tensor, own: Tensor | None) -> Tensor:
        """A batch norm of x (B, L_r, H) by the statistics of all ranks' inputs, padding left out."""
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        inside = torch.ones_like(x[..., :1], dtype=torch.bool)
        if own is not None:
            inside = ~padding(own, x.shape[1])[..., None]
        sums = torch.where(inside, z, 0).sum((0, 1), dtype=torch.float64)
        sums = self.sum(torch.cat([sums, inside.sum()[None]]))
        mean, n = (sums[:-1] / sums[-1]).to(z.dtype), sums[-1]
        z = z - mean
        squares = torch.where(inside, z, 0).square().sum((0, 1), dtype=torch.float64)
        var = (self.sum(squares) / n).to(z.dtype)
        if norm.training and norm.running_mean is not None and norm.running_var is not None:
            with torch.no_grad():
                count = norm.num_batches_tracked
                assert count is not None
                count += 1
                share: Any = 1 / count.double() if norm.momentum is None else norm.momentum
                norm.running_mean += share * (mean - norm.running_mean)
                norm.running_var += share * (var * (n / (n - 1)) - norm.running_var)
        z = z * torch.rsqrt(var + norm.eps)
        if norm.affine:
            z = z * norm.weight + norm.bias
        return z.to(x.dtype)

    @dispatch.eager
    def sequence(
        self,
        systems: tuple[Any, ...],
        D: Tensor,
        u: Tensor,
        x: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        mode: str,
        products: torch.dtype,
        backend: str,
        return_state: bool,
        kept: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `s4.sequence.sequence`, whose arguments these are: u and resets of the piece, all else whole."""
        batch, L, _ = u.shape
        own = None if lengths is None else self.own(lengths)
        if resets is not None and own is not None:
            resets = resets & ~padding(own, L)
        y, driven = sequence(systems, D, u, None, own, resets, mode, products, backend, True, kept)
        assert driven is not None
        recurrence = discretize(system(*systems))
        ahead = recurrence._replace(C=recurrence.C[:1])
        parts, counts = [driven], None if resets is None else resets.cumsum(1)
        if both := len(recurrence.C) == 2:
            seen = u if counts is None else torch.where((counts == 0)[..., None], u, 0)
            last = torch.full((batch, 1), L - 1, device=u.device)
            found = states(seen.flip(1), ahead, D.to(u.dtype), None, last, None, backend, None)
            parts.append(found[:, 0])
        way = Way(self._steps(lengths, counts, u), self.total, self.ring.rank, return_state)
        before, *others = hand(recurrence, torch.stack(parts), x, way, self.ring)
        more = continuation(ahead, before, L, backend)
        if counts is not None:  # up to the first reset
            more = torch.where((counts == 0)[:, None], more, 0)
        if both:
            X = others[0].to(recurrence.a.dtype).transpose(0, 1)
            behind = recurrence._replace(C=recurrence.C[1:])
            later = response(behind, L, u.dtype, backend, X)[0].flip(-1)
            if counts is not None:  # from the last reset on
                later = torch.where((counts == counts[:, -1:])[:, None], later, 0)
            more = more + later
        y = y + more.transpose(1, 2)
        return y if own is None else zero_padding(y, own), others[-1] if return_state else None

    def _steps(self, lengths: Tensor | None, counts: Tensor | None, u: Tensor) -> Tensor:
        """(ranks, B): inputs of each sequence in each piece; `FAR` more where this holds a reset.

        From the lengths of whole sequences and the numbers of resets (B, L_r) in this piece so far.
        """
        steps = torch.tensor(self.sizes, device=u.device)[:, None].expand(-1, u.shape[0])
        if lengths is not None:
            ends = steps.cumsum(0)
            steps = torch.minimum((lengths - ends + steps).clamp(min=0), steps)
        if self.cut:
            own = steps.new_zeros(u.shape[0]) if counts is None else (counts > 0).any(1).long()
            steps = steps + FAR * gathered(own, self.ring)
        return steps


def piece(
    module: nn.Module,
    u: Tensor,
    state: Any,
    lengths: Tensor | None,
    resets: Tensor | None,
    rate: float | Tensor,
    return_state: bool,
) -> Piece | None:
    """The piece that u (B, L, ...) is in a call of a module, or None where u is a whole sequence.

    All ranks have to give the same of the arguments.

    Raises:
        ValueError: inside a transform of torch, or in a backward pass that cannot tell the group.
    """
    if not isinstance(u, Tensor) or u.dim() < 2:  # which its caller refuses
        return None
    if _idle and dispatch.compiling():  # in a graph that is compiled anew when this changes
        return None
    given = {"state": state, "lengths": lengths, "resets": resets, "return_state": return_state or None}
    names = [name for name, value in given.items() if value is not None]
    return _piece(module, u, names, rate, lengths)


@dispatch.eager
def _piece(
    module: nn.Module, u: Tensor, given: list[str], rate: float | Tensor, lengths: Tensor | None
) -> Piece | None:
    ring = _where(module)
    if ring is None or ring.size == 1:
        return None
    if isinstance(rate, Tensor):
        raise ValueError(f"rate must be a number inside sequence_parallel, got a tensor {tuple(rate.shape)}")
    if dispatch.transformed():
        raise ValueError("sequence_parallel does not go with torch.func, vmap or forward-mode derivatives")
    if dispatch.exporting():
        raise ValueError("sequence_parallel does not go with torch.export")
    cut = "resets" in given
    if isinstance(lengths, Tensor) and not unread(lengths):
        given = [*given, f"of {lengths.tolist()}"]
    kind = f"batch size {u.shape[0]}", f"width {tuple(u.shape[2:])}", f"{u.dtype}"
    what = *given, f"rate {rate}", *kind, dispatch.gradients(u)
    call = f"{type(module).__name__}({', '.join(what)})"
    return Piece(ring, u, call, cut)


def _where(module: nn.Module) -> Ring | None:
    """The group that a module runs in: that of the `with`, or in a backward pass that of its forward pass."""
    inside = _ring.get()
    ring, explicit = inside if inside is not None else (None, False)
    if explicit:  # entered in this backward pass
        return ring
    seen = _alive(_seen.get(module, []))
    if dispatch.recomputing():
        groups = {None if where is None else where.group for _, where in seen}
        if len(groups) > 1 or (not seen and ring is None and module in _unsaid):
            raise ValueError(
                f"a backward pass runs a checkpointed {type(module).__name__} again, which ran in several "
                "groups, or in one and in none, or in eval(), and cannot tell in which now: checkpoint(..., "
                "use_reentrant=False, context_fn=lambda: (nullcontext(), sequence_parallel(group))) tells it"
            )
        return seen[0][1] if seen else ring
    hook = dispatch.recomputable(module.training)
    if hook is False and ring is not None:
        _unsaid.add(module)
    elif hook:
        entry = weakref.ref(hook) if isinstance(hook, FunctionType) else True, ring
        _seen[module] = seen if entry in seen else [*seen, entry]
    return ring


def _alive(seen: list[tuple[Any, Ring | None]]) -> list[tuple[Any, Ring | None]]:
    """Those that may be run again."""
    return [(held, ring) for held, ring in seen if held is True or held() is not None]
