"""mode="scan" takes what comes: padding, empty and strided inputs, every dtype, no numbers at all."""

import oracle
import pytest
import torch
from scan_cases import CASES, PAIR, Case, H, T, build, ids, inputs, truth
from torch import Tensor

pytestmark = pytest.mark.usefixtures("blocks")


@pytest.mark.parametrize("case", [*PAIR, CASES[4]], ids=ids)
def test_padded_is_unpadded(case: Case) -> None:
    """Each sequence alone, from its own state to its own end; what lies past an end is not looked at."""
    layer = build(case)
    L = 3 * T + 5
    sizes = [L, 1, 0, T, 2 * T + 1]
    u, x = inputs(case, L, batch=len(sizes))
    for b, size in enumerate(sizes):
        u[b, size:] = torch.nan
    lengths = torch.tensor(sizes)
    if case.bidirectional:
        y, last = layer(u, lengths=lengths, rate=case.rate), None
    else:
        y, last = layer(u, x, lengths=lengths, rate=case.rate, return_state=True)
    for b, size in enumerate(sizes):
        want, state = truth(layer, case, u[b : b + 1, :size], None if case.bidirectional else x[b : b + 1])
        oracle.close(y[b : b + 1, :size], want, 1e-9)
        assert (y[b, size:] == 0).all()
        if last is not None:
            oracle.close(last[b : b + 1], state, 1e-9)


@pytest.mark.parametrize("case", [*PAIR, CASES[4]], ids=ids)
def test_empty_sequences_and_batches(case: Case) -> None:
    layer = build(case)
    _, x = inputs(case, 1)
    for batch, L in ((2, 0), (0, 7), (0, 3 * T + 1), (0, 0)):
        u = torch.randn(batch, L, H).double().requires_grad_()
        y = layer(u)
        assert y.shape == (batch, L, H)
        y.sum().backward()
        assert all((p.grad == 0).all() for p in layer.parameters())
        if not case.bidirectional:
            assert torch.equal(layer(u, x[:batch], return_state=True)[1], x[:batch])
            assert torch.equal(layer(u, return_state=True)[1], layer.initial_state(batch))


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=ids)
def test_hostile_strides(case: Case) -> None:
    layer = build(case)
    base = torch.randn(80, 2 * H, 6).double()
    variants = {
        "transposed": base[:, :H].permute(2, 0, 1),
        "contiguous in time": base[:H].permute(2, 1, 0),
        "sliced": base.permute(2, 0, 1)[:, 1::2, ::2],
        "expanded batch": base[:1, :, :1].permute(2, 1, 0).expand(3, 2 * H, H),
        "expanded time": base[:3, :1, :1].expand(3, 70, H),
        "flipped": base[:, :H].permute(2, 0, 1).flip(1),
    }
    for name, u in variants.items():
        weight = torch.randn_like(u.contiguous())
        results = []
        for v in (u, u.contiguous()):
            v = v.detach().requires_grad_()
            y = layer(v)
            results.append((y, torch.autograd.grad(y, v, weight.mT.contiguous().mT)[0]))
        for got, want in zip(*results, strict=True):
            oracle.close(got, want, 1e-12, name)


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_output_has_the_dtype_of_the_input(input_dtype: torch.dtype) -> None:
    """The arithmetic is float32 throughout: only the output is rounded."""
    layer = build(CASES[0], torch.float32)
    u, x = inputs(CASES[0], 100)
    u = u.to(input_dtype)
    y, state = layer(u, x.float(), return_state=True)
    want, last = layer(u.float(), x.float(), return_state=True)
    assert y.dtype == input_dtype
    assert state.dtype == torch.float32
    assert torch.equal(y, want.to(input_dtype))
    assert torch.equal(state, last)


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [Case("dplr", "legs", d_state=64), *CASES[4:6]], ids=ids)
def test_autocast_to_bfloat16_is_within_its_bound(case: Case, input_dtype: torch.dtype) -> None:
    """15 roundings, 3% of the largest value: of both factors in six products, there and back; not exact."""
    layer = build(case, torch.float32)
    u = torch.randn(2, 1047, H, dtype=input_dtype).float()
    weight = torch.randn_like(u)
    results = []
    for autocast in (False, True):
        v = u.to(input_dtype if autocast else torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if case.bidirectional:
                y, state = layer(v), torch.zeros(0)
            else:
                y, state = layer(v, return_state=True)
                assert state.dtype == torch.float32
        assert y.dtype == v.dtype
        grads = torch.autograd.grad((y * weight).sum(), [v, *layer.parameters()])
        results.append((y, state, *grads))
    for want, got in zip(*results, strict=True):
        oracle.close(got, want, 15 * 2**-9)
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_other_autocast_changes_anything(dtype: torch.dtype) -> None:
    """float16 has not the range for states, and float64 parameters ask for float64."""
    case = CASES[0]
    layer = build(case, torch.float32 if dtype == torch.float16 else torch.float64)
    u, x = inputs(case, 100, dtype=layer.D.dtype)
    want = layer(u, x, return_state=True)
    with torch.autocast("cpu", dtype):
        got = layer(u, x, return_state=True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("case", [*PAIR, CASES[4]], ids=ids)
def test_gradients_of_each_sequence_alone(case: Case) -> None:
    """torch.func's vmap of grad, and vmap over layers."""
    layer = build(case)
    u, _ = inputs(case, T + 3, batch=3)
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], u: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (u[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, u)
    for b in range(3):
        want = torch.autograd.grad(layer(u[b : b + 1]).square().sum(), list(layer.parameters()))
        for name, grad in zip(values, want, strict=True):
            oracle.close(got[name][b], grad, 1e-9, name)

    other = build(case)
    stacked = {name: torch.stack([p.detach(), values[name]]) for name, p in other.named_parameters()}
    both = torch.func.vmap(lambda v: torch.func.functional_call(layer, v, (u,)))(stacked)
    oracle.close(both[0], other(u), 1e-12)
    oracle.close(both[1], layer(u), 1e-12)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=ids)
def test_meta_device_gives_shapes(case: Case) -> None:
    layer = build(case, torch.float32).to("meta")
    u, x = (t.to("meta") for t in inputs(case, 70, dtype=torch.float32))
    assert layer(u).shape == u.shape
    if not case.bidirectional:
        y, state = layer(u, x, return_state=True)
        assert y.is_meta
        assert (y.shape, state.shape) == (u.shape, x.shape)
