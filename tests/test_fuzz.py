"""Random layers and inputs, against the recurrence that scipy makes of the raw parameters.

Each case is one layer (variant, initialisation, what training may have made of it), one input (shape,
strides, dtype, scale, lengths, resets, state, rates) and one way through it (whole, in chunks, step by step;
mode, backend, gradients or not). Outputs, states, kernels, matrices and the gradients of everything are
compared; each output to the size of its own segment.

FUZZ=10000 (make fuzz) tries that many random cases; without it the same few hundred each time. What fails is
shrunk and printed as `Case(...)`: `check(Case(...))` runs it again.
"""

import os
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
from fuzzing import RATES, Case, Inputs, Truth, by_scipy, close, truth
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import s4.kernel
from s4 import S4Layer, hippo

TESTS = 4  # variants times dtypes
EXAMPLES = int(os.environ.get("FUZZ", "300")) // TESTS
INITS = {variant: [*hippo.names(variant), "own"] for variant in ("dplr", "diag")}
BACKENDS = [name for name in ("torch", "cpu", "naive") if not isinstance(s4.kernel.backends()[name], str)]
# Of the largest value of a kernel, as promised, beside what its terms lose where they cancel.
KERNEL = {torch.float64: 1e-9, torch.float32: 1e-5}
# Of the sizes of the terms that outputs and states add up: as promised; some 16 roundings, twice what a
# sum of the 64 terms of a chunk has.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6}
# Of the largest gradient: products of two such sums, summed over time and batch; what cancels in them is not
# in their size.
GRADIENTS = {torch.float64: 1e-9, torch.float32: 1e-4}


@st.composite
def cases(draw: st.DrawFn, variant: str, dtype: str) -> Case:
    """The first of each choice by preference: that is what they shrink to.

    One source of random choices, as of many strategies Hypothesis would copy what one drew to another.
    """
    random = draw(st.randoms(use_true_random=False))
    choice, some = random.choice, partial(random.choice, [False, True])
    both, n_ssm = choice([False, False, True]), random.randint(1, 3)
    way = "whole" if both else choice(["whole", "chunks", "steps"])
    usual, edge = random.randint(1, 40), choice([0, 63, 64, 65, 127, 128, 129])
    longer = choice([edge, edge, random.randint(1, 200), random.randint(500, 1200)])
    input_dtype = choice([dtype, dtype, dtype, "float32", "float64", "bfloat16", "float16"])
    return Case(
        variant,
        dtype,
        seed=random.randrange(2**20),
        init=choice(INITS[variant]),
        discretization="bilinear" if variant == "dplr" else choice(["zoh", "bilinear"]),
        d_state=choice([2, 4, 6, 8, 10, 16, 32, 34, 64]),
        H=n_ssm * random.randint(1, 6 // n_ssm),
        n_ssm=n_ssm,
        bidirectional=both,
        parameters=choice(["initial", "trained", "any"]),
        mode=choice(["auto", "fft", "scan"]),
        backend=choice(["auto", *BACKENDS]),
        training=some(),
        gradients=some(),
        batch=choice([1, 2, 3, 1, 2, 3, 4, 5, 0]),
        L=usual if way == "steps" else choice([usual, longer]),
        rate=choice([1.0, 0.25, 0.7, 2.0, 4.0]),
        times=choice(["number", "number", "rows", "steps"]),
        way=way,
        state=not both and some(),
        lengths=way == "whole" and some(),
        resets=choice([-1, -1, 0.0, 0.01, 0.1, 0.5, 1.0]),
        loud=input_dtype not in ("float16", "bfloat16") and some(),
        positions=choice([0, 0, 1, 3]),
        layout=choice(["plain", "channels first", "batch last", "sliced", "expanded", "negated"]),
        input_dtype=input_dtype,
        scale=0 if input_dtype == "float16" else choice([0, 0, -20, -3, 10]),
    )


def build(case: Case) -> S4Layer:
    """The layer, in which something was computed before its parameters changed."""
    torch.manual_seed(case.seed)
    n, init = case.d_state // 2, case.init
    if init == "own":
        Lambda = torch.complex(-torch.rand(n).double(), 5 * torch.randn(n).double())
        P, B = (torch.randn(*shape, n, dtype=torch.complex128) for shape in ((1 + case.seed % 3,), ()))
        init = (Lambda, P, B) if case.variant == "dplr" else (Lambda, B)
    layer = S4Layer(
        case.H,
        case.d_state,
        variant=case.variant,
        init=init,
        discretization=case.discretization,
        n_ssm=case.n_ssm,
        bidirectional=case.bidirectional,
        mode=case.mode,
        backend=case.backend,
        dtype=case.dtype,
    ).train(case.training)
    with torch.no_grad():
        layer(torch.ones(1, case.L, case.H), rate=case.rate)
        if not case.bidirectional:
            layer.step(torch.ones(1, case.H), layer.initial_state(1), rate=case.rate)
        for name, p in layer.named_parameters():
            if case.parameters == "trained":
                p.mul_(1 + 0.1 * torch.randn_like(p))
            elif case.parameters == "any":
                p.copy_(anything(name, p))
    return layer


def anything(name: str, p: Tensor) -> Tensor:
    """Modes from constant to gone within a step, at rest or many turns a step; steps over four decades."""
    if name == "log_dt":
        return torch.empty_like(p).uniform_(-9, 0)
    if name == "log_A_real":
        return torch.where(torch.rand_like(p) < 0.3, -60.0, torch.empty_like(p).uniform_(-12, 5))
    if name == "A_imag":
        return torch.where(torch.rand_like(p) < 0.3, 0.0, 30 * torch.randn_like(p))
    return torch.randn_like(p) * 10.0 ** torch.empty_like(p).uniform_(-2, 0.5)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same numbers (B, L, H), but for "expanded", at other strides."""
    if layout == "channels first":
        return t.mT.contiguous().mT
    if layout == "batch last":
        return t.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "sliced":
        around = t.new_full((t.shape[0], 2 * t.shape[1] + 1, t.shape[2] + 2), torch.nan)
        around[:, 1::2, 1:-1] = t
        return around[:, 1::2, 1:-1]
    if layout == "expanded":
        return t[:1, :, :1].expand(t.shape)
    if layout == "negated" and t.dtype in (torch.float32, torch.float64):
        return torch.complex(t, -t).conj().imag
    return t.contiguous()


class Problem(NamedTuple):
    """What goes in, and the cotangents of what comes out."""

    u: Tensor
    x: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None
    which: Tensor  # (B, L), of the rates
    positions: Tensor
    grads: tuple[Tensor, Tensor, Tensor]


def problem(case: Case) -> Problem:
    batch, L, H, N = case.batch, case.L, case.H, case.d_state
    dtype, input_dtype = getattr(torch, case.dtype), getattr(torch, case.input_dtype)
    scale = 10.0**case.scale
    u = laid_out((scale * torch.randn(batch, L, H).double()).to(input_dtype), case.layout)
    x = laid_out(scale * torch.randn(batch, H, N).to(dtype), case.layout) if case.state else None
    lengths = torch.randint(0, L + 1, (batch,)) if case.lengths else None
    if lengths is not None and batch:
        lengths[0] = L if case.seed % 2 else 0
    resets = torch.rand(batch, L) < case.resets
    if case.loud and case.layout != "expanded":  # of one number for all
        with torch.no_grad():
            u *= torch.where(resets.cumsum(1) % 3 == 1, 1e6, 1.0)[..., None].to(input_dtype)
    rows, count = torch.randint(0, 3, (batch, L)), case.positions * (not case.bidirectional)
    which = {"number": 0 * rows, "rows": rows[:, :1].expand(batch, L), "steps": rows}[case.times]
    positions = torch.randint(-1, max(L, 1) if L else 0, (batch, count))
    given = resets.mT.contiguous().mT if case.resets >= 0 else None
    g = laid_out(torch.randn(batch, L, H).to(input_dtype), case.layout)
    more = (torch.randn(batch, *shape, H, N).to(dtype) for shape in ((), (count,)))
    return Problem(u, x, lengths, given, which, positions, (g, *more))  # type: ignore[arg-type]


def run(case: Case, layer: S4Layer, given: Problem, rate: Any) -> list[Tensor]:
    """Outputs, of a causal layer the last state, in one of three ways, and states in between."""
    u, x, lengths, resets, *_ = given
    whole: dict[str, Any] = {"lengths": lengths, "resets": resets, "rate": rate}
    if case.bidirectional:
        return [layer(u, **whole)]
    between = []
    if case.positions and lengths is None:
        between = [layer.states(u, given.positions, x, resets=resets, rate=rate)]
    if case.way == "whole":
        if case.seed % 3 == 0:  # and a call without a state returned is the same
            return [layer(u, x, **whole), layer(u, x, **whole, return_state=True)[1], *between]
        return [*layer(u, x, **whole, return_state=True), *between]
    x = layer.initial_state(case.batch) if x is None else x
    y = [u[:, :0]]
    if case.way == "steps":
        for t, u_t in enumerate(u.unbind(1)):
            if resets is not None:
                x = torch.where(resets[:, t, None, None], 0, x)
            y_t, x = layer.step(u_t, x, rate=rate[:, t] if case.times == "steps" else rate)
            y.append(y_t[:, None])
    else:
        cuts = sorted({0, case.seed % (case.L + 1), case.seed // 1000 % (case.L + 1), case.L})
        for start, end in pairwise(cuts):
            here = None if resets is None else resets[:, start:end]
            time = rate[:, start:end] if case.times == "steps" else rate
            piece, x = layer(u[:, start:end], x, resets=here, rate=time, return_state=True)
            y.append(piece)
    return [torch.cat(y, 1), x, *between]


def check_systems(case: Case, layer: S4Layer, system: oracle.Discrete, want: Truth) -> None:
    """The matrices are scipy's, in the layer and in the oracle; the kernel is theirs."""
    p = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
    A, B = (torch.from_numpy(np.stack(part)) for part in zip(*by_scipy(case, p), strict=True))
    for name, source in (("oracle", system), ("layer", layer.dense(rate=case.rate))):
        for what, got, true in (("A", source[0], A), ("B", source[1], B)):
            size = true.abs().flatten(1).amax(1).clamp(min=what == "A").view(-1, *(1,) * (true.dim() - 1))
            close(got, true, 1e-9 * size, f"{what} of the {name}")
    method = ("auto", "sums", "powers")[case.seed % 3]
    got = layer.kernel(case.L, rate=case.rate, method=method)
    K, dtype = want.K, got.dtype
    bound = KERNEL[dtype] * K.abs() + TOLERANCE[dtype] * want.K_size
    bound = bound.amax(-1, keepdim=True) if case.L else bound
    close(got if case.bidirectional else got[None], K, bound, f"kernel by {method}")


def carried(case: Case, dtype: torch.dtype) -> float:
    """What a slowly decaying state gathers: it is rounded once a step, or once a chunk of at least 8 of them.

    So is the matrix that moves it; each time by half of the distance from one number to the next.
    """
    return torch.finfo(dtype).eps * (case.L if case.way == "steps" else case.L / 8)


def check_gradients(
    case: Case, leaves: dict[str, Tensor], got: tuple[Tensor, ...], want: tuple[Tensor, ...],
    true_leaves: dict[str, Tensor], given: Problem,
) -> None:  # fmt: skip
    """Within the largest value of each, for these cotangents or for others: the first may cancel."""

    def grads(outputs: tuple[Tensor, ...], cotangents: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        pairs = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
        y, g = zip(*pairs, strict=True) if pairs else (torch.zeros(1, requires_grad=True), None)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return torch.autograd.grad(y, tuple(inputs.values()), g, **options)

    cotangents = given.grads[: len(got)]
    found = grads(got, cotangents, leaves)
    doubles = [g.double() for g in cotangents]
    true = grads(want, doubles, true_leaves)
    other = grads(want, [torch.randn_like(g) for g in doubles], true_leaves)
    tolerance = GRADIENTS[getattr(torch, case.dtype)]
    for name, a, b, c in zip(leaves, found, true, other, strict=True):
        size = torch.cat([b.flatten(), c.flatten()]).abs().amax() if b.numel() else 0.0
        bound = (tolerance + torch.finfo(a.dtype).eps) * size  # of u it may be a sum of two that were rounded
        close(a, b, bound, f"gradient of {name}")


def rate_of(case: Case, given: Problem, times: Tensor) -> float | Tensor:
    """As the layer takes it; past the lengths it may be anything."""
    if case.times == "number":
        return case.rate
    if case.times == "rows" and case.L:
        return times[given.which[:, 0]]
    if case.times == "rows":
        return times[:1].expand(case.batch)
    rate = times[given.which]
    past = False if given.lengths is None else torch.arange(case.L) >= given.lengths[:, None]
    return torch.where(torch.as_tensor(past), torch.nan, rate)


def check(case: Case) -> None:
    """One case, all that can be compared."""
    layer = build(case)
    given = problem(case)
    dtype = getattr(torch, case.dtype)
    leaves: dict[str, Tensor] = {**dict(layer.named_parameters()), "u": given.u}
    if given.x is not None:
        leaves["x"] = given.x
    if case.times != "number":
        leaves["times"] = case.rate * torch.tensor(RATES, dtype=dtype)
        case = case._replace(rate=float(leaves["times"][0]))  # as it was rounded
    true_leaves = {name: t.detach().to(dtype).double().clone() for name, t in leaves.items()}
    for t in (*leaves.values(), *true_leaves.values()):
        t.requires_grad_(case.gradients)
    if given.lengths is not None and case.layout != "expanded":
        with torch.no_grad():  # what lies past the end is ignored, whatever it is
            given.u[torch.arange(case.L) >= given.lengths[:, None]] = torch.nan
    before = [t.detach().clone() for t in leaves.values()]
    rates = [case.rate] if case.times == "number" else true_leaves["times"].unbind()
    systems = [oracle.discrete(true_leaves, case.discretization, rate) for rate in rates]  # type: ignore[arg-type]
    ends = torch.full((case.batch,), case.L) if given.lengths is None else given.lengths
    none = torch.zeros(case.batch, case.L, dtype=torch.bool)
    resets = none if given.resets is None else given.resets
    want = truth(systems, Inputs(true_leaves["u"], true_leaves.get("x"), ends, resets, given.which))
    with torch.no_grad():
        check_systems(case, layer, systems[0], want)
    with torch.set_grad_enabled(case.gradients):
        got = run(case, layer, given, rate_of(case, given, leaves.get("times", ends)))
    assert got[0].dtype == given.u.dtype
    for name, a, b in zip(leaves, leaves.values(), before, strict=True):
        assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)), f"{name} was changed"
    tolerance = TOLERANCE[dtype] + carried(case, dtype)
    rows = torch.arange(case.batch)
    inside = torch.arange(case.L) < ends[:, None]
    wanted = [torch.where(inside[..., None], want.y, 0.0)]
    close(got[0], wanted[0], tolerance * want.y_size, "output")
    for what, at, x in zip(("state", "states"), (ends[:, None], given.positions + 1), got[1:], strict=False):
        assert x.dtype == dtype
        wanted.append(want.states[rows[:, None], at].view(x.shape))
        size = want.state_size[rows[:, None], at].view(*x.shape[:-1], 1)
        close(x, wanted[-1], tolerance * size, what)
    if case.gradients:
        check_gradients(case, leaves, tuple(got), tuple(wanted), true_leaves, given)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("variant", ["dplr", "diag"])
def test_a_layer_is_the_recurrence_of_its_parameters(variant: str, dtype: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(cases(variant, dtype))
    def every(case: Case) -> None:
        check(case)

    start = None if "FUZZ" in os.environ else f"{variant} {dtype}"
    every() if start is None else seed(start)(every)()
