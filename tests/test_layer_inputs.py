"""S4Layer takes what comes: padding, empty and strided inputs, every dtype, no numbers at all."""

import math

import oracle
import pytest
import torch
from layer_cases import CASES, PAIR, Case, H, build, ids, inputs, system
from torch import Tensor


@pytest.mark.parametrize("case", [*PAIR, CASES[3], CASES[16]], ids=ids)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_padded_is_unpadded(case: Case, dtype: torch.dtype) -> None:
    """Each sequence alone, from its own state to its own end; what lies past an end is not looked at."""
    layer = build(case)
    sizes = [case.L, 1, 0, case.L // 2, case.L - 1]
    u, x = inputs(case, batch=len(sizes))
    for b, size in enumerate(sizes):
        u[b, size:] = 1e4 * torch.randn(case.L - size, H)
    u.requires_grad_()
    lengths = torch.tensor(sizes, dtype=dtype)
    if case.bidirectional:
        y, last = layer(u, lengths=lengths, rate=case.rate), None
    else:
        y, last = layer(u, x, lengths=lengths, rate=case.rate, return_state=True)
    assert y.shape == u.shape
    for b, size in enumerate(sizes):
        want, state = oracle.forward(
            system(layer, case), u[b : b + 1, :size], None if case.bidirectional else x[b : b + 1]
        )
        oracle.close(y[b : b + 1, :size], want, 1e-9)
        assert (y[b, size:] == 0).all()
        if last is not None:
            oracle.close(last[b : b + 1], state, 1e-9)
    (grad,) = torch.autograd.grad(y.square().sum() + (0 if last is None else last.square().sum()), u)
    for b, size in enumerate(sizes):
        assert (grad[b, size:] == 0).all()
        assert (grad[b, :size] != 0).all()


NARROW = [torch.uint8, torch.int8, torch.int16, torch.int32]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", [*PAIR, CASES[3]], ids=ids)
def test_narrow_lengths_are_lengths(case: Case, dtype: torch.dtype) -> None:
    """L and the distances to it need not fit the dtype of the lengths."""
    layer = build(case)
    u, x = inputs(case._replace(L=300))
    sizes = [100, 50]
    keywords = {} if case.bidirectional else {"state": x, "return_state": True}
    want = layer(u, lengths=torch.tensor(sizes), **keywords)
    got = layer(u, lengths=torch.tensor(sizes, dtype=dtype), **keywords)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    y = got if case.bidirectional else got[0]
    for b, size in enumerate(sizes):
        assert (y[b, size:] == 0).all()
        assert (y[b, :size] != 0).all()


def test_padding_of_the_state_without_an_incoming_one() -> None:
    case = CASES[1]
    layer = build(case)
    u, _ = inputs(case, batch=3)
    lengths = torch.tensor([0, 40, 97])
    _, last = layer(u, lengths=lengths, return_state=True)
    assert (last[0] == 0).all()
    for b in (1, 2):
        _, want = oracle.forward(system(layer, case), u[b : b + 1, : lengths[b]])
        oracle.close(last[b : b + 1], want, 1e-9)


def test_padding_may_hold_nan() -> None:
    """A batch may come out of torch.empty, or of a log of garbage."""
    layer = build(CASES[1])
    u, _ = inputs(CASES[1])
    u[1, 50:] = math.nan
    y, state = layer(u, lengths=torch.tensor([97, 50]), return_state=True)
    assert torch.isfinite(y).all()
    assert torch.isfinite(state).all()


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[12], CASES[19]], ids=ids)
def test_empty_sequences_and_batches(case: Case) -> None:
    layer = build(case)
    _, x = inputs(case)
    for batch, L in ((2, 0), (0, 7), (0, 0)):
        u = torch.randn(batch, L, H).double().requires_grad_()
        y = layer(u)
        assert y.shape == (batch, L, H)
        y.sum().backward()
        assert layer(u, lengths=torch.zeros(batch, dtype=torch.long)).shape == (batch, L, H)
        if not case.bidirectional:
            _, state = layer(u, x[:batch], return_state=True)
            assert torch.equal(state, x[:batch])
            assert torch.equal(layer(u, return_state=True)[1], layer.initial_state(batch))
    directions = (2,) if case.bidirectional else ()
    assert layer.kernel(0).shape == (*directions, H, 0)
    if not case.bidirectional:
        y, state = layer.step(torch.zeros(0, H).double(), layer.initial_state(0))
        assert y.shape == (0, H)
        assert state.shape == (0, H, case.d_state)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=ids)
def test_hostile_strides(case: Case) -> None:
    layer = build(case)
    base = torch.randn(case.L * 2, 2 * H, 3).double()
    variants = {
        "transposed": base[: case.L, :H].permute(2, 0, 1),
        "sliced": base.permute(2, 0, 1)[:, 1::2, ::2],
        "expanded batch": base[:1, : case.L if case.L < 2 * H else 2 * H, :1].expand(3, 2 * H, H),
        "expanded time": base[:3, :1, :1].expand(3, case.L, H),
        "flipped": base[: case.L, :H].permute(2, 0, 1).flip(1),
    }
    for name, u in variants.items():
        oracle.close(layer(u), layer(u.contiguous()), 1e-12, name)
    if not case.bidirectional:
        u = variants["transposed"]
        x = torch.randn(case.d_state, H, 3).double().permute(2, 1, 0)
        got, want = layer(u, x, return_state=True), layer(u.contiguous(), x.contiguous(), return_state=True)
        for g, w in zip(got, want, strict=True):
            oracle.close(g, w, 1e-12)
        for g, w in zip(
            layer.step(u[:, 3], x), layer.step(u[:, 3].contiguous(), x.contiguous()), strict=True
        ):
            oracle.close(g, w, 1e-12)
        expanded = x[:1].expand(3, -1, -1)
        oracle.close(layer(u, expanded), layer(u, expanded.contiguous()), 1e-12)


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[7], CASES[13], CASES[19]], ids=ids)
def test_meta_device_gives_shapes(case: Case) -> None:
    layer = build(case, torch.float32).to("meta")
    u, x = (t.to("meta") for t in inputs(case, dtype=torch.float32))
    directions = (2,) if case.bidirectional else ()
    shapes = [(layer(u), u.shape), (layer.kernel(7), (*directions, H, 7))]
    if not case.bidirectional:
        y, state = layer(u, x, return_state=True)
        shapes += [(y, u.shape), (state, x.shape)]
        y, state = layer.step(u[:, 0], layer.initial_state(2))
        shapes += [(y, (2, H)), (state, x.shape)]
    for value, shape in shapes:
        assert value.is_meta
        assert value.dtype == torch.float32
        assert tuple(value.shape) == tuple(shape)


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[13]], ids=ids)
def test_output_has_the_dtype_of_the_input_and_state_that_of_the_parameters(
    case: Case, input_dtype: torch.dtype
) -> None:
    layer = build(case, torch.float32)
    u, x = inputs(case, dtype=torch.float32)
    u = u.to(input_dtype)
    y = layer(u)
    assert y.dtype == input_dtype
    # The arithmetic is float32 throughout: only the output is rounded.
    oracle.close(y, layer(u.float()).to(input_dtype), 1e-3 if input_dtype == torch.bfloat16 else 1e-6)
    if not case.bidirectional:
        y, state = layer(u, x, return_state=True)
        y_t, state_t = layer.step(u[:, 0], x)
        assert y.dtype == y_t.dtype == input_dtype
        assert state.dtype == state_t.dtype == torch.float32
        oracle.close(state, layer(u.float(), x, return_state=True)[1], 1e-6)


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[13]], ids=ids)
def test_autocast_leaves_the_arithmetic_alone(case: Case) -> None:
    layer = build(case, torch.float32)
    u, x = inputs(case, dtype=torch.float32)
    u.requires_grad_()

    def everything() -> list[Tensor]:
        values = [layer(u), layer.kernel(7), *layer.dense()]
        if not case.bidirectional:
            values += [*layer(u, x, return_state=True), *layer.step(u[:, 0], x)]
        return values

    want = everything()
    with torch.autocast("cpu", torch.bfloat16):
        got = everything()
        grad = torch.autograd.grad(got[0].square().sum(), u)[0]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)
    oracle.close(grad, torch.autograd.grad(want[0].square().sum(), u)[0], 1e-6)
