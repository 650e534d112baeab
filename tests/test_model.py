"""S4Model: whole, chunked and stepped are one function after training; pooling and padding."""

import copy
import io
import math
import pickle

import oracle
import pytest
import torch
from stacks import TABLE, L, build, in_chunks, in_steps, incoming, inputs, offloaded, same, tensors, trained
from torch import nn
from torch.utils import _pytree as pytree

import s4
from s4 import State


@pytest.mark.parametrize(
    ("stack", "block", "pooling", "tokens"),
    [*((*row, False) for row in TABLE), *((*row, True) for row in TABLE[-3:])],  # of each pooling
)
def test_whole_chunks_and_steps_agree(stack: str, block: str, pooling: str, tokens: bool) -> None:
    model = trained(stack, block, pooling, tokens=tokens)
    u = inputs(3, tokens)
    for state, rate in ((model.initial_state(3), 1.0), (incoming(model), 1.0), (incoming(model), 0.5)):
        want, last = model(u, state, rate=rate, return_state=True)
        assert torch.equal(want, model(u, state, rate=rate))
        stepped, end = in_steps(model, u, state, rate)
        chunks, also = in_chunks(model, u, state, rate)
        same(end, last)
        same(also, last)
        if pooling == "none":
            oracle.close(stepped, want, 1e-9)
            oracle.close(torch.cat(chunks, 1), want, 1e-9)
        else:  # pooled outputs are those of the sequence so far
            oracle.close(stepped[:, -1], want, 1e-9)
            oracle.close(chunks[-1], want, 1e-9)
            oracle.close(stepped[:, 11], chunks[1], 1e-9)
            for t in (1, 8, 20):
                oracle.close(stepped[:, t - 1], model(u[:, :t], state, rate=rate), 1e-9)
    oracle.close(model(u, model.initial_state(3)), model(u), 1e-12)


@pytest.mark.parametrize(("stack", "block", "pooling"), TABLE)
def test_gradients_of_whole_chunks_and_steps_agree(stack: str, block: str, pooling: str) -> None:
    """Of every parameter, the input and the incoming state, through outputs and last state."""
    model = trained(stack, block, pooling)
    u = inputs().requires_grad_()
    state = incoming(model)
    leaves = [u, *state.layers, *([state.total] if pooling == "mean" else []), *model.parameters()]
    results = []
    for way in ("whole", "chunks", "steps"):
        if way == "whole":
            y, last = model(u, state, return_state=True)
        elif way == "chunks":
            pieces, last = in_chunks(model, u, state)
            y = torch.cat(pieces, 1) if pooling == "none" else pieces[-1]
        else:
            y, last = in_steps(model, u, state)
            y = y if pooling == "none" else y[:, -1]
        weight = torch.linspace(-1, 2, y.numel()).double().view_as(y)
        loss = (y * weight).sum() + sum(x.square().sum() for x in last.layers)
        results.append(torch.autograd.grad(loss, leaves))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            oracle.close(got, want, 1e-8)
    assert all(grad.abs().max() > 0 for grad in results[0])


@pytest.mark.parametrize("both", [False, True], ids=["causal", "both"])
@pytest.mark.parametrize(("stack", "block", "pooling"), TABLE)
def test_padded_is_unpadded(stack: str, block: str, pooling: str, both: bool) -> None:
    model = trained(stack, block, pooling, both=both)
    sizes = [L, 1, 13, L - 1]
    u = inputs(len(sizes))
    for b, size in enumerate(sizes):
        u[b, size:] = 1e3
    lengths = torch.tensor(sizes)
    state = None if both else incoming(model, len(sizes))
    y = model(u, state, lengths=lengths)
    for b, size in enumerate(sizes):
        alone = None
        if state is not None:
            alone = State(
                tuple(x[b : b + 1] for x in state.layers), state.total[b : b + 1], state.length[b : b + 1]
            )
        if both:
            want = model(u[b : b + 1, :size])
        else:
            want, want_state = model(u[b : b + 1, :size], alone, return_state=True)
            _, last = model(u, state, lengths=lengths, return_state=True)
            row = State(
                tuple(x[b : b + 1] for x in last.layers), last.total[b : b + 1], last.length[b : b + 1]
            )
            same(row, want_state)
        oracle.close(y[b : b + 1, :size] if pooling == "none" else y[b : b + 1], want, 1e-9)
        if pooling == "none":
            assert (y[b, size:] == 0).all()


NARROW = [torch.uint8, torch.int8, torch.int16, torch.int32]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_narrow_lengths_are_lengths(pooling: str, dtype: torch.dtype) -> None:
    """L and what is counted on from the lengths need not fit their dtype."""
    model = build(pooling=pooling).eval()
    u = inputs(2, length=300)
    want = model(u, lengths=torch.tensor([100, 50]), return_state=True)
    y, state = model(u, lengths=torch.tensor([100, 50], dtype=dtype), return_state=True)
    oracle.close(y, want[0], 0)
    same(state, want[1], 0)
    assert state.length.dtype == torch.int64
    # Ten steps and a chunk beyond the largest number of the dtype, against each sequence alone.
    sizes = [120, 100] if dtype == torch.int8 else [250, 100]
    first, more = u[:, :250], inputs(2, length=20)
    _, state = model(first, lengths=torch.tensor(sizes, dtype=dtype), return_state=True)
    assert state.length.dtype == torch.int64
    stepped, state = in_steps(model, more[:, :10], state)
    lengths = torch.tensor([10, 10], dtype=dtype)
    y, state = model(more[:, 10:], state, lengths=lengths, return_state=True)
    assert state.length.dtype == torch.int64
    assert state.length.tolist() == [size + 20 for size in sizes]
    for b, size in enumerate(sizes):
        alone = torch.cat([first[b : b + 1, :size], more[b : b + 1]], 1)
        if pooling == "none":
            whole = model(alone)
            oracle.close(torch.cat([stepped, y], 1)[b : b + 1], whole[:, size:], 1e-9)
        else:
            oracle.close(stepped[b : b + 1, -1], model(alone[:, :-10]), 1e-9)
            oracle.close(y[b : b + 1], model(alone), 1e-9)


@pytest.mark.parametrize("both", [False, True], ids=["causal", "both"])
@pytest.mark.parametrize(("stack", "block", "pooling"), TABLE)
def test_padding_is_not_looked_at(stack: str, block: str, pooling: str, both: bool) -> None:
    """NaN there is as good as zero, in the outputs and in the gradient of every parameter."""
    model = trained(stack, block, pooling, both=both)
    sizes = [L, 1, 13]
    clean = inputs(len(sizes))
    results = []
    for filler in (0.0, math.nan):
        u = clean.clone()
        for b, size in enumerate(sizes):
            u[b, size:] = filler
        y = model(u, lengths=torch.tensor(sizes))
        weight = torch.linspace(-1, 2, y.numel()).double().view_as(y)
        results.append([y, *torch.autograd.grad((y * weight).sum(), list(model.parameters()))])
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.isfinite(got).all()
        oracle.close(got, want, 1e-12)


@pytest.mark.promise("torch.func and forward mode", "`vmap` over a model's inputs and lengths")
@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_lengths_may_be_mapped_over(pooling: str) -> None:
    """As torch.func maps anything: their numbers are not looked at, as in torch.compile."""
    model = trained("mixed", "prenorm", pooling)
    u, lengths = inputs(6).view(2, 3, L, -1), torch.tensor([[L, 1, 0], [5, 6, 7]])
    y, state = torch.vmap(lambda u, n: model(u, lengths=n, return_state=True))(u, lengths)
    want, last = model(u.flatten(0, 1), lengths=lengths.flatten(), return_state=True)
    oracle.close(y.flatten(0, 1), want, 1e-9)
    same(State(*pytree.tree_map(lambda x: x.flatten(0, 1), state)), last)
    rows = torch.tensor([[2, 0], [1, 1]])
    some = torch.vmap(lambda total, rows: State((), total, total[:, 0].long()).select(rows).total)
    assert torch.equal(
        some(state.total, rows), torch.stack([state.total[0, rows[0]], state.total[1, rows[1]]])
    )


@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_padding_may_be_no_token(pooling: str) -> None:
    """-100, which losses leave out of account, is outside every embedding."""
    model = trained("mixed", "prenorm", pooling, tokens=True)
    sizes = [L, 1, 13]
    clean = inputs(len(sizes), True)
    results = []
    for filler in (3, -100):
        u = clean.clone()
        for b, size in enumerate(sizes):
            u[b, size:] = filler
        y = model(u, lengths=torch.tensor(sizes))
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
        assert (u[1, 1:] == filler).all()
    for got, want in zip(results[1], results[0], strict=True):
        oracle.close(got, want, 1e-12)


@pytest.mark.parametrize("length", [1, L])
@pytest.mark.parametrize("block", ["prenorm", "final norm"])
@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_model_is_its_parts(pooling: str, block: str, length: int) -> None:
    model = trained("mixed", block, pooling)
    u = inputs(length=length)
    x = model.encoder(u)
    for part in model.blocks:
        x = part(x)
    if block == "final norm":
        x = model.norm(x)
        oracle.close(model(u, return_state=True)[1].total, x.sum(1), 1e-12)
    pooled = {"none": x, "mean": x.mean(1), "last": x[:, -1]}[pooling]
    oracle.close(model(u), model.decoder(pooled), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_all_but_the_layers_in_another_dtype(pooling: str, dtype: torch.dtype) -> None:
    model = trained("mixed", "final norm", pooling).to(dtype)
    for block in model.blocks:
        block.layer.float()
    u = inputs().to(dtype)
    want, last = model(u, return_state=True)
    assert want.dtype == dtype
    assert {x.dtype for x in (*last.layers, last.total)} == {torch.float32}
    oracle.close(model(u), want, 0.02)
    oracle.close(model(u, model.initial_state(3), lengths=torch.tensor([L, L, L])), want, 0.02)
    stepped, state = in_steps(model, u, model.initial_state(3))
    assert stepped.dtype == dtype
    same(state, last, 0.05)
    oracle.close((stepped if pooling == "none" else stepped[:, -1]).double(), want.double(), 0.05)


@pytest.mark.promise(
    "sharding and distributed training", "parameters that are there only in a module's own `forward`"
)
@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_a_model_reads_no_parameters_of_its_parts(pooling: str) -> None:
    """With all parameters away but while their own module runs, in generation also."""
    model = trained("mixed", "final norm", pooling, tokens=True)
    away, u, lengths = offloaded(model), inputs(tokens=True), torch.tensor([L, 1, 5])
    want, state = model(u, lengths=lengths, return_state=True)
    got, found = away(u, lengths=lengths, return_state=True)
    oracle.close(got, want, 1e-9)
    same(found, state)
    for (y, after), (z, also) in (
        (away(u, state, return_state=True), model(u, state, return_state=True)),
        (away.step(u[:, 0], state), model.step(u[:, 0], state)),
    ):
        oracle.close(y, z, 1e-9)
        same(after, also)
    if pooling == "none":
        assert torch.equal(away.generate(u, 5, lengths=lengths), model.generate(u, 5, lengths=lengths))


@pytest.mark.promise(
    "sharding and distributed training",
    "FSDP2: a plain state, `step` also where it is registered as a forward method",
)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch built without torch.distributed")
@pytest.mark.parametrize("sharded", ["model", "blocks", "layers"])
def test_the_state_of_a_sharded_model_is_plain(sharded: str) -> None:
    """FSDP2, as one process has it: parameters are DTensors but in `forward` and what is registered."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = trained("mixed", "final norm", "mean")
    parts = {"model": [model], "blocks": model.blocks, "layers": [block.layer for block in model.blocks]}[
        sharded
    ]
    u, start = inputs(), model.initial_state(3)
    want, want_step = model(u, lengths=torch.tensor([L, 1, 0]), return_state=True), model.step(u[:, 0], start)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for part in parts:
            register_fsdp_forward_method(fully_shard(part, mesh=mesh), "step")
        assert type(model.blocks[0].layer.D.data) is not torch.Tensor
        state = model.initial_state(3)
        assert {type(x) for x in tensors(state)} == {torch.Tensor}
        same(state, start, 0)
        got = model(u, state, lengths=torch.tensor([L, 1, 0]), return_state=True)
        for (y, after), (z, also) in ((got, want), (model.step(u[:, 0], state), want_step)):
            oracle.close(y, z, 1e-9)
            same(after, also)
    finally:
        torch.distributed.destroy_process_group()


def test_batch_norm_may_be_the_norm_of_a_model() -> None:
    model = build().requires_grad_(False)
    model.norm = norm = nn.BatchNorm1d(model.blocks[0].layer.d_model, momentum=1.0).double()
    u, sizes = inputs(), [L, 1, 5]

    def before(u: torch.Tensor) -> torch.Tensor:
        return model.blocks[1](model.blocks[0](model.encoder(u)))[0]

    model(u, lengths=torch.tensor(sizes))
    x = torch.cat([before(u[b : b + 1, :n]) for b, n in enumerate(sizes)])
    oracle.close(norm.running_mean, x.mean(0), 1e-9)  # not of the padding
    model.eval()
    want = model.decoder((before(u[:1]) - x.mean(0)) / (x.var(0) + norm.eps).sqrt())
    oracle.close(model(u)[0], want, 1e-9)
    oracle.close(in_steps(model, u, model.initial_state(3))[0], model(u), 1e-9)


def test_bidirectional_model_has_no_step() -> None:
    model = trained(both=True)
    changed = inputs()
    other = changed.clone()
    other[:, -1] += 1
    assert not torch.allclose(model(changed)[:, 0], model(other)[:, 0])
    with pytest.raises(ValueError, match="bidirectional"):
        model.initial_state(2)
    with pytest.raises(ValueError, match="bidirectional"):
        model(changed, return_state=True)


@pytest.mark.promise("other libraries", "`copy.deepcopy`, `pickle`, `torch.save` and `torch.load` of a model")
def test_state_dict_and_copies() -> None:
    model, other = trained("dplr", "batch"), build("dplr", "batch").eval()
    u = inputs()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(u), model(u))
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(u), model(u))
    assert not any(value.is_complex() for value in model.state_dict().values())


def test_forward_changes_nothing() -> None:
    model = trained("mixed", "prenorm", "mean")
    before = copy.deepcopy(model.state_dict())
    state = incoming(model)
    kept = [x.detach().clone() for x in tensors(state)]
    model(inputs(), state, lengths=torch.tensor([3, L, 0]), return_state=True)
    model.step(inputs()[:, 0], state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip(kept, tensors(state), strict=True))


def test_autocast_keeps_the_state_float32() -> None:
    model = trained("mixed", "prenorm", "mean").float()
    u = inputs().float()
    want, want_state = model(u, return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = model(u, return_state=True)
        _, stepped = model.step(u[:, 0], state)
    for x in (*state.layers, state.total, *stepped.layers, stepped.total):
        assert x.dtype == torch.float32
    oracle.close(y.float(), want, 0.1)
    for got, x in zip(state.layers, want_state.layers, strict=True):
        oracle.close(got, x, 0.1)


def test_public_names() -> None:
    names = [
        "S4Block",
        "S4Layer",
        "S4Model",
        "State",
        "categorical",
        "greedy",
        "hippo",
        "kernel",
        "padding",
        "param_groups",
    ]
    assert sorted(s4.__all__) == names
    assert all(hasattr(s4, name) for name in names)
