"""S4Block against its parts put together by hand, and its two views against each other."""

import copy
import math
import pickle

import oracle
import pytest
import torch
from stacks import offloaded
from torch import Tensor, nn

from s4 import S4Block, S4Layer

D_MODEL, D_STATE, L = 6, 8, 23
OPTIONS = [
    {},
    {"norm": "layer", "prenorm": False, "mixer": "linear"},
    {"norm": "batch", "prenorm": True, "mixer": "glu"},
    {"norm": "batch", "prenorm": False, "mixer": "linear"},
    {"norm": "rms", "prenorm": True, "mixer": "linear"},
    {"norm": "rms", "prenorm": False, "mixer": "glu", "activation": "gelu"},
    {"norm": "layer", "prenorm": True, "mixer": "glu", "d_ff": 10},
    {"norm": "batch", "prenorm": False, "mixer": "linear", "activation": "silu", "d_ff": 3},
]


ACTIVATIONS = {
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "relu": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "tanh": lambda z: 1 - 2 / (1 + torch.exp(2 * z)),
}


def ids(options: dict[str, object]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items()) or "default"


def build(bidirectional: bool = False, variant: str = "dplr", **options: object) -> S4Block:
    """A block in eval mode, its norms away from the identity and its batch statistics from (0, 1)."""
    layer = S4Layer(D_MODEL, D_STATE, variant=variant, bidirectional=bidirectional, dtype=torch.float64)
    block = S4Block(layer, **options).double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if not name.startswith("layer."):
                parameter.add_(0.3 * torch.randn_like(parameter))
        block.train()
        for _ in range(3):
            block(2 + 3 * torch.randn(4, L, D_MODEL).double())
    return block.eval()


def norm_of(block: S4Block, options: dict[str, object]) -> nn.Module:
    """The norm of the S4 layer; that of the feed-forward network comes after it."""
    kinds = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "rms": nn.RMSNorm}
    return next(m for m in block.modules() if isinstance(m, kinds[options.get("norm", "layer")]))


def by_hand(block: S4Block, options: dict[str, object], x: Tensor) -> Tensor:
    """x + mix(act(S4(norm x))), or norm(x + mix(act(S4 x))), with every formula written out.

    Then, if asked for, the same with down(act(up(x))) in the place of mix(act(S4(x))).
    """
    prenorm, act = options.get("prenorm", True), ACTIVATIONS[options.get("activation", "gelu")]
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == (3 if "d_ff" in options else 1)
    norms = [m for m in block.modules() if isinstance(m, type(norm_of(block, options)))]

    def normed(norm: nn.Module, z: Tensor) -> Tensor:
        if options.get("norm") == "batch":
            z = (z - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps)
        elif options.get("norm") == "rms":
            z = z / torch.sqrt(z.square().mean(-1, keepdim=True) + (norm.eps or torch.finfo(z.dtype).eps))
        else:
            z = (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, keepdim=True, correction=0) + norm.eps)
        return z * norm.weight + (0 if options.get("norm") == "rms" else norm.bias)

    def mixed(z: Tensor) -> Tensor:
        z = act(block.layer(z)) @ linears[0].weight.T + linears[0].bias
        if options.get("mixer", "glu") == "glu":
            z = z[..., :D_MODEL] * torch.sigmoid(z[..., D_MODEL:])
        return z

    def fed(z: Tensor) -> Tensor:
        up, down = linears[1:]
        return act(z @ up.weight.T + up.bias) @ down.weight.T + down.bias

    for branch, norm in zip([mixed, fed], norms, strict=False):
        x = x + branch(normed(norm, x)) if prenorm else normed(norm, x + branch(x))
    return x


@pytest.mark.parametrize("options", [*OPTIONS, *({"activation": name} for name in ACTIVATIONS)], ids=ids)
def test_block_is_its_parts(options: dict[str, object]) -> None:
    block = build(**options)
    x = torch.randn(3, L, D_MODEL).double()
    oracle.close(block(x), by_hand(block, options, x), 1e-9)


@pytest.mark.parametrize("variant", ["dplr", "diag"])
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_whole_chunks_and_steps_agree(options: dict[str, object], variant: str) -> None:
    block = build(variant=variant, **options)
    x = torch.randn(3, L, D_MODEL).double()
    state = torch.randn(3, D_MODEL, D_STATE).double()
    for rate in (1.0, 0.5):
        want, last = block(x, state, rate=rate, return_state=True)
        first, middle = block(x[:, :9], state, rate=rate, return_state=True)
        second, end = block(x[:, 9:], middle, rate=rate, return_state=True)
        oracle.close(torch.cat([first, second], 1), want, 1e-9)
        oracle.close(end, last, 1e-9)
        stepped, outputs = state, []
        for t in range(L):
            y, stepped = block.step(x[:, t], stepped, rate=rate)
            outputs.append(y)
        oracle.close(torch.stack(outputs, 1), want, 1e-9)
        oracle.close(stepped, last, 1e-9)
    assert not torch.allclose(block(x), block(x, rate=0.5))


def test_initial_state_is_the_layers() -> None:
    block = build()
    assert torch.equal(block.initial_state(3), torch.zeros(3, D_MODEL, D_STATE).double())
    x = torch.randn(3, L, D_MODEL).double()
    oracle.close(block(x, block.initial_state(3)), block(x), 1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_a_block_reads_no_parameters_of_its_parts(options: dict[str, object]) -> None:
    """What offloads them, such as accelerate, brings them when the `forward` of a part is called."""
    block = build(**options)
    away = offloaded(block)
    assert all(p.is_meta for p in away.parameters())
    x, state = torch.randn(3, L, D_MODEL).double(), torch.randn(3, D_MODEL, D_STATE).double()
    lengths = torch.tensor([L, 0, 5])
    for got, want in zip(
        (*away(x, state, lengths=lengths, return_state=True), *away.step(x[:, 0], state)),
        (*block(x, state, lengths=lengths, return_state=True), *block.step(x[:, 0], state)),
        strict=True,
    ):
        oracle.close(got, want, 1e-9)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both"])
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_padded_is_unpadded(options: dict[str, object], bidirectional: bool) -> None:
    block = build(bidirectional, **options)
    lengths = torch.tensor([L, 1, 11])
    x = torch.randn(3, L, D_MODEL).double()
    x[1, 1:], x[2, 11:] = 1e3, -1e3
    y = block(x, lengths=lengths)
    for b, size in enumerate(lengths):
        oracle.close(y[b : b + 1, :size], block(x[b : b + 1, :size]), 1e-9)
    if not bidirectional:
        _, state = block(x, lengths=lengths, return_state=True)
        for b, size in enumerate(lengths):
            oracle.close(state[b : b + 1], block(x[b : b + 1, :size], return_state=True)[1], 1e-9)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both"])
@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("norm") != "batch"], ids=ids)
def test_padded_is_unpadded_in_training(options: dict[str, object], bidirectional: bool) -> None:
    """Also where the norm's bias would lie behind the ends, and in the gradients."""
    block = build(bidirectional, **options).train()
    x = torch.randn(1, L, D_MODEL).double()
    padded = block(x, lengths=torch.tensor([11]))[:, :11]
    alone = block(x[:, :11])
    oracle.close(padded, alone, 1e-9)
    parameters = list(block.parameters())
    wanted = torch.autograd.grad(alone.square().sum(), parameters)
    for got, want in zip(torch.autograd.grad(padded.square().sum(), parameters), wanted, strict=True):
        oracle.close(got, want, 1e-9)


def test_padding_costs_no_precision() -> None:
    """In float32, where batch norm makes large numbers of zeros, and an FFT mixes them with the rest."""
    block = build(norm="batch").float()
    block.layer.mode = "fft"
    norm_of(block, {"norm": "batch"}).running_mean.fill_(1e3)
    outputs: list[Tensor] = []
    block.layer.register_forward_hook(lambda layer, inputs, y: outputs.append(y[:, :300]))
    x = 1e3 + torch.randn(1, 4000, D_MODEL)
    block(x, lengths=torch.tensor([300]))
    block.double()(x[:, :300].double())
    # x and the mean, both 1e3, may each be rounded before they cancel to what is of order one.
    oracle.close(outputs[0], outputs[1], 1e3 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both"])
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_padding_is_not_looked_at(options: dict[str, object], bidirectional: bool, training: bool) -> None:
    """NaN there is as good as zero, in the outputs and in every gradient."""
    block = build(bidirectional, **options).train(training)
    sizes = [L, 1, 0, 11]
    clean = torch.randn(len(sizes), L, D_MODEL).double()
    results = []
    for filler in (0.0, math.nan):
        x = clean.clone()
        for b, size in enumerate(sizes):
            x[b, size:] = filler
        x.requires_grad_()
        twin = copy.deepcopy(block)
        y = twin(x, lengths=torch.tensor(sizes))
        assert torch.isfinite(y).all()
        inside = torch.cat([y[b, :size] for b, size in enumerate(sizes)])
        loss = (inside * torch.linspace(-1, 2, inside.numel()).double().view_as(inside)).sum()
        grads = torch.autograd.grad(loss, [x, *twin.parameters()])
        for b, size in enumerate(sizes):
            assert (grads[0][b, size:] == 0).all()
        buffers = [value for value in twin.buffers() if value.is_floating_point()]
        results.append([inside, *grads, *buffers])
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.isfinite(got).all()
        oracle.close(got, want, 1e-12)


@pytest.mark.promise("sharding and distributed training", "`SyncBatchNorm` within a block")
@pytest.mark.parametrize("length", [D_MODEL, L])
def test_synchronised_batch_norm_is_batch_norm(length: int) -> None:
    """In evaluation, which needs no other process; its channels are those of the model, not the steps."""
    block = build(norm="batch", d_ff=5)
    x, sizes = torch.randn(3, length, D_MODEL).double(), torch.tensor([length, 1, 3])
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in other.modules()) == 2
    oracle.close(other(x, lengths=sizes), block(x, lengths=sizes), 1e-12)
    state = block.initial_state(3)
    oracle.close(other.step(x[:, 0], state)[0], block.step(x[:, 0], state)[0], 1e-12)


@pytest.mark.parametrize("prenorm", [True, False])
def test_batch_norm_in_training_counts_no_padding(prenorm: bool) -> None:
    """Statistics of a padded batch are those over the positions inside its sequences."""
    block = build(norm="batch", prenorm=prenorm).train()
    other = copy.deepcopy(block)
    x = torch.randn(4, L, D_MODEL).double()
    sizes = [L, 5, 0, 11]
    lengths = torch.tensor(sizes)
    for b, size in enumerate(sizes):
        x[b, size:] = 50.0
    padded = block(x, lengths=lengths)
    norm = norm_of(block, {"norm": "batch"})
    if prenorm:
        inside = torch.cat([x[b, :size] for b, size in enumerate(sizes)])
        before = norm_of(other, {"norm": "batch"})
        keep, take = 1 - norm.momentum, norm.momentum
        oracle.close(norm.running_mean, keep * before.running_mean + take * inside.mean(0), 1e-12)
        oracle.close(norm.running_var, keep * before.running_var + take * inside.var(0), 1e-12)
    x[x == 50.0] = -9.0
    again = other(x, lengths=lengths)
    for b, size in enumerate(sizes):
        oracle.close(padded[b, :size], again[b, :size], 1e-12)


def test_dropout_is_off_in_eval_and_scales_in_training() -> None:
    block = build(dropout=0.5, mixer="linear")
    x = torch.randn(2, L, D_MODEL).double()
    assert torch.equal(block(x), block(x))
    block.train()
    assert not torch.equal(block(x), block(x))
    # The mixer is linear here, so that the mean over masks is the output without dropout.
    x = x[:1]
    mean = block(x.expand(1000, L, D_MODEL)).mean(0, keepdim=True)
    want = block.eval()(x)
    assert (mean - want).abs().max() < 0.2 * (want - x).abs().max()
    assert (mean - want).abs().mean() < 0.03 * (want - x).abs().max()


def test_dropout_within_the_feed_forward_network() -> None:
    block = build(dropout=0.5, d_ff=40)
    with torch.no_grad():
        block.mixer[0].weight.zero_()  # what follows S4 is the same at every draw
    x = torch.randn(2, L, D_MODEL).double()
    assert torch.equal(block(x), block(x))
    block.train()
    assert not torch.equal(block(x), block(x))
    mean = block(x.repeat(1000, 1, 1)).view(1000, *x.shape).mean(0)  # a mask for every number
    want = block.eval()(x)
    assert (mean - want).abs().mean() < 0.1 * (want - x).abs().mean()


def test_tied_dropout_draws_one_mask_over_time() -> None:
    """A constant sequence after its transient: tied masks leave it constant in time, free ones do not."""
    x = torch.ones(3, 9, D_MODEL).double()
    for tied in (True, False):
        block = build(dropout=0.5, tie_dropout=tied, mixer="linear").train()
        with torch.no_grad():
            block.layer.C.zero_()  # y = D u: no transient at all
        change = block(x) - x
        constant = torch.allclose(change, change[:, :1].expand_as(change))
        assert constant == tied
        if tied:  # one mask a sequence, not one for the batch
            assert not torch.allclose(change[0], change[1])


@pytest.mark.parametrize("tied", [False, True])
def test_residual_dropout_zeroes_what_is_added(tied: bool) -> None:
    """In training each sum is x, or x and twice what it is in evaluation; tied, the same at every time."""
    block = build(residual_dropout=0.5, tie_dropout=tied, prenorm=True).eval()
    x = torch.randn(4, L, D_MODEL).double()
    added = block(x) - x
    drawn = block.train()(x) - x
    kept = drawn != 0
    oracle.close(drawn, 2 * added * kept, 1e-12)
    assert 0.3 < kept.double().mean() < 0.7
    assert tied == bool((kept == kept[:, :1]).all())
    assert not bool((kept == kept[:1]).all()), "a draw for each sequence"
    y, _ = block.step(x[:, 0], block.initial_state(4))
    assert bool((y == x[:, 0]).any())


def test_residual_dropout_of_the_feed_forward_network() -> None:
    block = build(residual_dropout=0.5, d_ff=7).train()
    with torch.no_grad():
        for p in block.mixer.parameters():
            p.zero_()  # nothing is added by S4
    x = torch.randn(4, L, D_MODEL).double()
    kept = block(x) != x
    assert 0.3 < kept.double().mean() < 0.7


def test_blocks_without_norm_or_activation() -> None:
    """x + mix(S4(x)), as the formula has it."""
    block = build(norm="none", activation="none", mixer="linear", d_ff=5).eval()
    x = torch.randn(2, L, D_MODEL).double()
    y = x + block.mixer(block.layer(x))
    up, down = block.feed_forward["up"], block.feed_forward["down"]
    oracle.close(block(x), y + down(up(y)), 1e-12)
    assert not any("norm" in name for name in block.state_dict())


@pytest.mark.parametrize("d_ff", [0, 5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_reaches_every_parameter(activation: str, d_ff: int) -> None:
    block = build(activation=activation, d_ff=d_ff).train()
    x = torch.randn(2, L, D_MODEL).double().requires_grad_()
    block(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in [x, *block.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_block_takes_the_dtype_of_its_layer(dtype: torch.dtype) -> None:
    block = S4Block(S4Layer(D_MODEL, D_STATE, dtype=dtype), d_ff=5)
    assert {p.dtype for p in block.parameters()} == {dtype}
    assert block(torch.randn(2, 5, D_MODEL, dtype=dtype)).dtype == dtype


def test_autocast_runs_and_keeps_the_state_float32() -> None:
    block = S4Block(S4Layer(D_MODEL, D_STATE))
    x = torch.randn(2, L, D_MODEL)
    want, want_state = block(x, return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = block(x, return_state=True)
        y_t, state_t = block.step(x[:, 0], block.initial_state(2))
    assert state.dtype == state_t.dtype == torch.float32
    oracle.close(y.float(), want, 0.05)
    oracle.close(state, want_state, 0.05)
    oracle.close(y_t.float(), want[:, 0], 0.05)


def test_copies_and_pickles() -> None:
    block = build(norm="batch")
    x = torch.randn(2, L, D_MODEL).double()
    block(x).sum().backward()
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x))
