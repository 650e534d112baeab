"""A PackedSequence of torch.nn.utils.rnn in and out, as nn.GRU takes and gives it."""

from typing import Any

import pytest
import torch
from stacks import D_MODEL, build, inputs
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, unpack_sequence

from s4 import S4Block, S4Layer, State

LENGTHS = (3, 11, 1, 7)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)  # float64, products of other sizes


def modules() -> dict[str, Any]:
    causal = {"dtype": torch.float64, "dt_min": 0.01}
    return {
        "layer": S4Layer(D_MODEL, 8, **causal),
        "both directions": S4Layer(D_MODEL, 8, variant="diag", bidirectional=True, **causal),
        "block": S4Block(S4Layer(D_MODEL, 8, **causal), d_ff=4).eval(),
        "model": build("mixed", "final norm", "none").eval(),
    }


def sequences(name: str) -> list[Tensor]:
    u = inputs(len(LENGTHS)) if name == "model" else torch.randn(len(LENGTHS), 29, D_MODEL).double()
    return [row[:length].clone().requires_grad_() for row, length in zip(u, LENGTHS, strict=True)]


@pytest.mark.promise(
    "torch.nn", "a `PackedSequence` in and out, sorted or not, with states in the order of `h_0`"
)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("name", modules())
def test_packed_sequences_are_each_alone(name: str, ordered: bool) -> None:
    module = modules()[name]
    alone = sequences(name)
    if ordered:
        alone.sort(key=len, reverse=True)
    packed = pack_sequence([u.detach().requires_grad_() for u in alone], enforce_sorted=ordered)
    packed.data.retain_grad()
    y = module(packed)
    assert isinstance(y, PackedSequence)
    assert torch.equal(y.batch_sizes, packed.batch_sizes)
    assert (y.sorted_indices is None) == ordered
    for got, u in zip(unpack_sequence(y), alone, strict=True):
        close(got, module(u[None])[0])
    # Gradients, of inputs and parameters
    weights = [torch.randn_like(part) for part in unpack_sequence(y)]
    sum((w * part).sum() for w, part in zip(weights, unpack_sequence(y), strict=True)).backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    sum((w * module(u[None])[0]).sum() for w, u in zip(weights, alone, strict=True)).backward()
    for got, p in zip(grads, module.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-9, atol=1e-9 * float(p.grad.abs().max()) + 1e-12)
    of_inputs = unpack_sequence(PackedSequence(packed.data.grad, *packed[1:]))
    for got, u in zip(of_inputs, alone, strict=True):
        close(got, u.grad)


@pytest.mark.parametrize("name", ["layer", "block", "model"])
def test_states_rates_and_resets_have_the_order_of_the_sequences(name: str) -> None:
    module = modules()[name]
    alone = sequences(name)
    longest, n = max(LENGTHS), len(LENGTHS)
    rates = 0.5 + torch.rand(n, longest)
    resets = torch.rand(n, longest) < 0.2
    _, before = module(torch.randn(n, 5, *alone[0].shape[1:]).double(), return_state=True)
    packed = pack_sequence(alone, enforce_sorted=False)
    y, after = module(packed, before, rate=rates, resets=resets, return_state=True)
    for i, (got, u) in enumerate(zip(unpack_sequence(y), alone, strict=True)):
        row = slice(i, i + 1)
        state = before.select(row) if isinstance(before, State) else before[row]
        cut = {"rate": rates[row, : len(u)], "resets": resets[row, : len(u)]}
        want, last = module(u[None], state, **cut, return_state=True)
        close(got, want[0])
        for x, z in zip(after.layers, last.layers, strict=True) if name == "model" else [(after, last)]:
            close(x[row], z)


def test_the_layout_is_that_of_a_gru() -> None:
    """A recurrent network is replaced by a layer in the code around it, which sees the same packing."""
    u = torch.randn(len(LENGTHS), max(LENGTHS), D_MODEL)
    lengths = torch.tensor(LENGTHS)
    for ordered in (True, False):
        order = lengths.argsort(descending=True) if ordered else torch.arange(len(LENGTHS))
        packed = pack_padded_sequence(u[order], lengths[order], batch_first=True, enforce_sorted=ordered)
        theirs, _ = nn.GRU(D_MODEL, D_MODEL, batch_first=True)(packed)
        ours = S4Layer(D_MODEL, 8)(packed)
        assert theirs.data.shape == ours.data.shape
        for a, b in zip(theirs[1:], ours[1:], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", ["layer", "block", "model"])
def test_hooks_run_once(name: str) -> None:
    """As where parameters are brought by one: it sees what the module was called with."""
    module, seen = modules()[name], []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    packed = pack_sequence(sequences(name), enforce_sorted=False)
    y = module(packed)
    assert [value is wanted for value, wanted in zip(seen, (packed, y), strict=True)] == [True, True]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled_outputs_are_a_tensor(pooling: str) -> None:
    model = build("dplr", "prenorm", pooling).eval()
    alone = [u[:length] for u, length in zip(inputs(4), LENGTHS, strict=True)]
    y, state = model(pack_sequence(alone, enforce_sorted=False), return_state=True)
    close(y, torch.cat([model(u[None]) for u in alone]))
    assert state.length.tolist() == list(LENGTHS)


def test_tokens() -> None:
    model = build("diag", "postnorm", "none", tokens=True).eval()
    alone = [torch.randint(11, (length,)) for length in LENGTHS]
    for got, u in zip(unpack_sequence(model(pack_sequence(alone, enforce_sorted=False))), alone, strict=True):
        close(got, model(u[None])[0])


@pytest.mark.parametrize("name", ["layer", "block", "model"])
def test_lengths_are_refused(name: str) -> None:
    packed = pack_sequence(sequences(name), enforce_sorted=False)
    with pytest.raises(ValueError, match="lengths must be left out with a PackedSequence"):
        modules()[name](packed, lengths=torch.tensor(LENGTHS))
    with pytest.raises((ValueError, TypeError), match="rate"):
        modules()[name](packed, rate=torch.ones(4, 12))
