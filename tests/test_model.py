"""S4Model: whole, chunked and stepped are one function after training; pooling, padding, generation."""

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor, nn

import s4.model
from s4 import S4Block, S4Layer, S4Model, param_groups

D_IN, D_MODEL, D_STATE, D_OUT, VOCABULARY, L = 3, 6, 8, 5, 11, 29

STACKS = {
    "dplr": [{"variant": "dplr"}, {"variant": "dplr", "init": "legt", "n_ssm": 2}],
    "diag": [{"variant": "diag"}, {"variant": "diag", "init": "lin", "discretization": "bilinear"}],
    "mixed": [{"variant": "dplr", "init": "fout"}, {"variant": "diag", "init": "inv"}],
}
BLOCKS = {
    "prenorm": {},
    "postnorm": {"prenorm": False, "mixer": "linear"},
    "batch": {"norm": "batch"},
    "rms": {"norm": "rms", "dropout": 0.3, "tie_dropout": True},
    "final norm": {},  # after the last block, before the pooling
}
TABLE = [
    ("dplr", "prenorm", "none"),
    ("dplr", "batch", "mean"),
    ("diag", "postnorm", "last"),
    ("diag", "rms", "none"),
]
TABLE += [("mixed", "prenorm", "mean"), ("mixed", "postnorm", "none")]
TABLE += [("mixed", "final norm", pooling) for pooling in ("none", "mean", "last")]


def build(
    stack: str = "mixed",
    block: str = "prenorm",
    pooling: str = "none",
    *,
    tokens: bool = False,
    both: bool = False,
) -> S4Model:
    """Two layers, float64; the decoder is not linear, so that pooling must come before it."""
    encoder = nn.Embedding(VOCABULARY, D_MODEL) if tokens else nn.Linear(D_IN, D_MODEL)
    layers = [
        S4Layer(D_MODEL, D_STATE, bidirectional=both, dt_min=0.01, **options) for options in STACKS[stack]
    ]
    blocks = [S4Block(layer, **BLOCKS[block]) for layer in layers]
    decoder = nn.Sequential(nn.Linear(D_MODEL, VOCABULARY if tokens else D_OUT), nn.Tanh())
    norm = nn.LayerNorm(D_MODEL) if block == "final norm" else None
    return S4Model(encoder, blocks, decoder, pooling=pooling, norm=norm).double()


def trained(*arguments: str, **keywords: bool) -> S4Model:
    """After six steps of AdamW on noise: a model away from its initialisation, in eval mode."""
    model = build(*arguments, **keywords)
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.02, weight_decay=0.01, ssm_lr=0.02))
    first = copy.deepcopy(model.state_dict())
    for _ in range(6):
        u = inputs(4, keywords.get("tokens", False))
        model(u).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(first[name], p) for name, p in model.named_parameters())
    return model.eval()


def inputs(batch: int = 3, tokens: bool = False, length: int = L) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length)) if tokens else torch.randn(batch, length, D_IN).double()


def tensors(state: s4.model.ModelState) -> list[Tensor]:
    return [*state.layers, state.total, state.length]


def same(got: s4.model.ModelState, want: s4.model.ModelState, tolerance: float = 1e-9) -> None:
    for g, w in zip(tensors(got), tensors(want), strict=True):
        oracle.close(g, w, tolerance)


def incoming(model: S4Model, batch: int = 3) -> s4.model.ModelState:
    """The state some inputs leave, a leaf of its own."""
    _, state = model(inputs(batch, isinstance(model.encoder, nn.Embedding), 7), return_state=True)
    layers = tuple(x.detach().requires_grad_() for x in state.layers)
    return s4.model.ModelState(layers, state.total.detach().requires_grad_(), state.length)


def in_steps(
    model: S4Model, u: Tensor, state: s4.model.ModelState, rate: float = 1.0
) -> tuple[Tensor, s4.model.ModelState]:
    outputs = []
    for t in range(u.shape[1]):
        y, state = model.step(u[:, t], state, rate=rate)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def in_chunks(
    model: S4Model, u: Tensor, state: s4.model.ModelState, rate: float = 1.0
) -> tuple[list[Tensor], s4.model.ModelState]:
    outputs = []
    for chunk in u.split([1, 11, u.shape[1] - 13, 1], 1):
        y, state = model(chunk, state, rate=rate, return_state=True)
        outputs.append(y)
    return outputs, state


@pytest.mark.parametrize("tokens", [False, True], ids=["reals", "tokens"])
@pytest.mark.parametrize(("stack", "block", "pooling"), TABLE)
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
            alone = s4.model.ModelState(
                tuple(x[b : b + 1] for x in state.layers), state.total[b : b + 1], state.length[b : b + 1]
            )
        if both:
            want = model(u[b : b + 1, :size])
        else:
            want, want_state = model(u[b : b + 1, :size], alone, return_state=True)
            _, last = model(u, state, lengths=lengths, return_state=True)
            row = s4.model.ModelState(
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


def test_state_of_the_stack() -> None:
    model = trained()
    state = model.initial_state(4)
    assert isinstance(state, s4.model.ModelState)
    assert [tuple(x.shape) for x in tensors(state)] == [(4, D_MODEL, D_STATE)] * 2 + [(4, D_MODEL), (4,)]
    assert all((x == 0).all() for x in tensors(state))
    _, state = model(inputs(4), state, lengths=torch.tensor([L, 1, 0, 5]), return_state=True)
    assert state.length.tolist() == [L, 1, 0, 5]


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


def by_prefix(model: S4Model, prompt: Tensor, steps: int, sample: Callable[[Tensor], Tensor]) -> Tensor:
    """Generation the slow way: the whole sequence again for every token."""
    sequence = prompt
    for _ in range(steps):
        sequence = torch.cat([sequence, sample(model(sequence)[:, -1])[:, None]], 1)
    return sequence[:, prompt.shape[1] :]


@pytest.mark.parametrize(("prompt_length", "steps"), [(1, 12), (9, 1), (9, 20)])
@pytest.mark.parametrize("stack", STACKS)
def test_generation_is_the_full_forward_on_a_growing_prefix(
    stack: str, prompt_length: int, steps: int
) -> None:
    model = trained(stack, tokens=True)
    prompt = inputs(3, True, prompt_length)

    def second_best(logits: Tensor) -> Tensor:
        assert logits.shape == (3, VOCABULARY)
        return logits.argsort(-1)[:, -2]

    greedy = model.generate(prompt, steps)
    assert greedy.shape == (3, steps)
    assert greedy.dtype == torch.long
    assert not greedy.requires_grad
    assert torch.equal(greedy, by_prefix(model, prompt, steps, lambda logits: logits.argmax(-1)))
    assert torch.equal(
        model.generate(prompt, steps, second_best), by_prefix(model, prompt, steps, second_best)
    )
    assert torch.equal(
        model.generate(prompt, steps, sample=second_best), model.generate(prompt, steps, second_best)
    )


@pytest.mark.parametrize("block", ["prenorm", "final norm"])
def test_stream_yields_what_generate_returns(block: str) -> None:
    model = trained("mixed", block, tokens=True)
    prompt = inputs(2, True, 5)
    assert torch.equal(model.generate(prompt, 8), by_prefix(model, prompt, 8, s4.model.greedy))
    streamed = torch.stack(list(itertools.islice(model.stream(prompt), 15)), 1)
    assert torch.equal(streamed, model.generate(prompt, 15))
    assert torch.is_grad_enabled()


def test_an_unfinished_stream_leaves_gradients_on() -> None:
    model = trained(tokens=True)
    stream = model.stream(inputs(2, True, 5))
    next(stream)
    assert torch.is_grad_enabled()
    assert model(inputs(2, True)).requires_grad
    next(stream)
    assert torch.is_grad_enabled()


def first_three(y: Tensor) -> Tensor:
    """A regression: the outputs are the next inputs."""
    return y[:, :D_IN]


def test_generation_of_reals() -> None:
    """A sampler may give anything the encoder takes; no graph grows along."""
    model = trained()
    prompt = inputs(2)
    got = model.generate(prompt, 6, first_three)
    oracle.close(got, by_prefix(model, prompt, 6, first_three), 1e-9)
    assert not got.requires_grad


def test_generation_follows_the_rate() -> None:
    model = trained()
    prompt = inputs(2)
    got = model.generate(prompt, 4, first_three, rate=0.5)
    with torch.no_grad():
        for block in model.blocks:
            block.layer.log_dt -= torch.log(torch.tensor(2.0))
    oracle.close(got, model.generate(prompt, 4, first_three), 1e-7)


def mixture(seed: int) -> Callable[[Tensor], Tensor]:
    """Draws (B, D_IN) from three Gaussians, of which outputs (B, D_OUT) hold the weights and the spread."""
    generator = torch.Generator().manual_seed(seed)

    def sample(y: Tensor) -> Tensor:
        component = torch.multinomial(torch.softmax(y[:, :3], -1), 1, generator=generator)
        mean = torch.linspace(-1, 1, 3, dtype=y.dtype)[component]
        return mean + torch.exp(y[:, 3:4]) * torch.randn(len(y), D_IN, dtype=y.dtype, generator=generator)

    return sample


def test_generation_draws_from_a_mixture() -> None:
    """A density over the reals is one more function from outputs to inputs."""
    model = trained()
    prompt = inputs(2)
    got = model.generate(prompt, 6, mixture(1))
    oracle.close(got, by_prefix(model, prompt, 6, mixture(1)), 1e-9)
    assert torch.equal(got, model.generate(prompt, 6, mixture(1)))
    assert not torch.allclose(got, model.generate(prompt, 6, mixture(2)))


def test_generation_goes_on_from_a_state() -> None:
    """A prompt in two parts is the prompt; one prefix serves many, each with its own end."""
    model = trained()
    prefix, ends = inputs(1, length=9), inputs(3, length=4)
    _, state = model(prefix, return_state=True)
    got = model.generate(ends, 10, first_three, state=state.select([0, 0, 0]))
    whole = torch.cat([prefix.expand(3, -1, -1), ends], 1)
    oracle.close(got, model.generate(whole, 10, first_three), 1e-9)
    assert not torch.allclose(got, model.generate(ends, 10, first_three))


@pytest.mark.parametrize("mode", ["auto", "fft"])
@pytest.mark.parametrize("tokens", [False, True], ids=["reals", "tokens"])
def test_a_ragged_batch_generates_what_each_prompt_does(tokens: bool, mode: str) -> None:
    model, sample = trained(tokens=tokens), None if tokens else first_three
    for block in model.blocks:
        block.layer.mode = mode
    sizes = [9, 1, 4]
    prompts = inputs(3, tokens, 9)
    alone = [model.generate(prompts[b : b + 1, :size], 12, sample) for b, size in enumerate(sizes)]
    for b, size in enumerate(sizes):
        prompts[b, size:] = -100  # no token
    got = model.generate(prompts, 12, sample, lengths=torch.tensor(sizes))
    oracle.close(got.double(), torch.cat(alone).double(), 1e-9)


def test_stop_ends_each_sequence() -> None:
    """By the definition: what generation without it gives, with the rest of each ended sequence padded."""
    model, steps, pad = trained(tokens=True), 25, -100
    prompt = inputs(4, True, 6)
    generator = torch.Generator()

    def drawn(**stop: int | Callable[[Tensor], Tensor]) -> Tensor:
        sample = s4.model.categorical(2.0, generator=generator.manual_seed(5))
        return model.generate(prompt, steps, sample, pad=pad, **stop)

    free = drawn()
    assert torch.equal(free, drawn())
    lengths = []
    for token in range(0, VOCABULARY, 3):
        want, ends = free.clone(), []
        for row in want:
            met = (row == token).nonzero()
            ends.append(int(met[0]) + 1 if len(met) else steps)
            row[ends[-1] :] = pad
        assert torch.equal(drawn(stop=token), want[:, : max(ends)])
        lengths.append(max(ends))
    assert torch.equal(drawn(stop=lambda new: new == token), want[:, : max(ends)])
    assert min(lengths) < steps == max(lengths)


def test_generation_is_over_when_all_sequences_are() -> None:
    """At the first input of the last; the stream ends there, and the model is not asked again."""
    model = trained()
    seen = []

    def sample(y: Tensor) -> Tensor:
        seen.append(len(seen) + 1)
        return torch.tensor([[1.0], [2.0]]).double().expand(-1, D_IN) * seen[-1]

    def stop(new: Tensor) -> Tensor:
        return new[:, 0] >= 6  # at steps 6 and 3

    got = model.generate(inputs(2), 100, sample, stop=stop, pad=0.5)
    assert got[..., 0].tolist() == [[1, 2, 3, 4, 5, 6], [2, 4, 6, 0.5, 0.5, 0.5]]
    assert seen == [1, 2, 3, 4, 5, 6]
    seen.clear()
    assert torch.equal(torch.stack(list(model.stream(inputs(2), sample, stop=stop, pad=0.5)), 1), got)


def kept_alone(p: Tensor, enough: Callable[[Tensor], bool]) -> Tensor:
    """By trying all: the likeliest of the smallest sets of tokens that are enough, with no other beside."""
    for size in range(1, len(p) + 1):
        sets = [list(c) for c in itertools.combinations(range(len(p)), size) if enough(p[list(c)])]
        if sets:
            best = max(sets, key=lambda tokens: float(p[tokens].sum()))
            alone = torch.zeros_like(p)
            alone[best] = p[best] / p[best].sum()
            return alone
    raise AssertionError("all tokens together are not enough")


CUTS: list[dict[str, float]] = [
    {},
    {"temperature": 0.4},
    {"top_k": 1},
    {"top_k": 3, "temperature": 2.0},
    {"top_k": 40},
    {"top_p": 1e-9},
    {"top_p": 0.6},
    {"top_p": 0.9, "temperature": 1.7},
    {"top_p": 1.0},
    {"top_k": 3, "top_p": 0.8},
    {"top_k": 4, "top_p": 0.95, "temperature": 3.0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_categorical_is_the_definition(cut: dict[str, float], dtype: torch.dtype) -> None:
    logits = torch.tensor([[2.0, 0.25, 1.0, -1.0, 0.5, -3.0], [1e4, 9998.0, 1.0, 9997.0, 9999.0, -math.inf]])
    logits = logits.to(dtype)
    draws = 20000
    kept = logits.clone()
    sample = s4.model.categorical(**cut, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits.repeat_interleave(draws, 0)).view(2, draws)
    assert torch.equal(logits, kept)
    for row, drawn in zip(logits.double(), tokens, strict=True):
        p = torch.softmax(row / cut.get("temperature", 1.0), -1)
        if "top_k" in cut:
            p = kept_alone(p, lambda q: len(q) >= min(cut["top_k"], 6))
        if "top_p" in cut:
            p = kept_alone(p, lambda q: float(q.sum()) >= cut["top_p"] - 1e-12)
        frequency = torch.bincount(drawn, minlength=6) / draws
        assert (frequency[p == 0] == 0).all()
        assert (frequency[p > 0.01] > 0).all()
        assert (frequency - p).abs().max() < 0.015  # four standard deviations


def test_draws_follow_the_generator_alone() -> None:
    model = trained(tokens=True)
    prompt = inputs(3, True, 5)

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 20, s4.model.categorical(generator=generator))

    first = drawn(1)
    torch.rand(7)
    assert torch.equal(drawn(1), first)
    assert not torch.equal(drawn(2), first)
    state = torch.get_rng_state()
    drawn(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_is_the_first_of_the_best() -> None:
    assert s4.model.greedy(torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 3.0]])).tolist() == [0, 1]


ROWS = [
    ([2, 0, 0, 1], [2, 0, 0, 1]),
    ((2, -3), [2, 0]),
    ([], []),
    (torch.tensor([1]), [1]),
    (torch.tensor([1, 0], dtype=torch.uint8), [1, 0]),
    (torch.tensor([True, False, True]), [0, 2]),
    (slice(1, None), [1, 2]),
    (slice(0, 0), []),
]


@pytest.mark.parametrize(("rows", "numbers"), ROWS, ids=str)
def test_selected_rows_go_on_as_their_sequences(rows: Tensor | list[int] | slice, numbers: list[int]) -> None:
    """Any index of the batch: as a beam search reorders, repeats and drops its hypotheses."""
    model = trained("mixed", "prenorm", "mean", tokens=True)
    u = inputs(3, True)
    _, state = model(u[:, :10], return_state=True)
    chosen = u[torch.tensor(numbers).long()]
    want, last = model(chosen, return_state=True)
    got, also = in_steps(model, chosen[:, 10:], state.select(rows))
    oracle.close(got[:, -1], want, 1e-9)
    same(also, last)


def test_beam_search_of_full_width_finds_the_best_sequence() -> None:
    model, steps = trained(tokens=True), 3
    prompt = inputs(1, True, 5)
    every = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=steps)))
    logits = model(torch.cat([prompt.expand(len(every), -1), every], 1))
    log_p = torch.log_softmax(logits[:, prompt.shape[1] - 1 : -1], -1)
    want = every[log_p.gather(-1, every[..., None])[..., 0].sum(1).argmax()]
    logits, state = model(prompt, return_state=True)
    found, score = torch.zeros(1, 0, dtype=torch.long), torch.log_softmax(logits[:, -1], -1)
    for step in range(steps):
        best = score.flatten().argsort(descending=True)
        parent, token = best // VOCABULARY, best % VOCABULARY
        found = torch.cat([found[parent], token[:, None]], 1)
        if step < steps - 1:
            y, state = model.step(token, state.select(parent))
            score = score[parent, token][:, None] + torch.log_softmax(y, -1)
    assert torch.equal(found[0], want)


def test_a_state_is_saved_moved_and_put_together() -> None:
    model = trained("mixed", "prenorm", "mean")
    state = incoming(model, 5)
    file = io.BytesIO()
    torch.save(state._asdict(), file)
    file.seek(0)
    for twin in (
        s4.model.ModelState(**torch.load(file, weights_only=True)),
        s4.model.ModelState(*state),
        pickle.loads(pickle.dumps(state)),
        s4.model.ModelState.cat([state.select([0]), state.select(slice(1, 4)), state.select([4])]),
    ):
        assert isinstance(twin, s4.model.ModelState)
        same(twin, state, 0)
        model.step(inputs(5)[:, 0], twin)
    narrow = state.to(dtype=torch.float32)
    assert [x.dtype for x in tensors(narrow)] == [torch.float32] * 3 + [torch.int64]
    same(narrow.to(torch.device("cpu"), torch.float64), state, 1e-6)
    model.float().step(inputs(5)[:, 0].float(), narrow)
    assert all(x.device.type == "meta" for x in tensors(state.to("meta")))


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
