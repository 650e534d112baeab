"""Generation is the full forward on a growing prefix; samplers are their definitions."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from refusals import EITHER, Kind, refuses
from stacks import D_IN, STACKS, VOCABULARY, inputs, small, trained
from torch import Tensor

from s4 import S4Block, S4Layer, S4Model, categorical, greedy


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

    likeliest = model.generate(prompt, steps)
    assert likeliest.shape == (3, steps)
    assert likeliest.dtype == torch.long
    assert not likeliest.requires_grad
    assert torch.equal(likeliest, by_prefix(model, prompt, steps, lambda logits: logits.argmax(-1)))
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
    assert torch.equal(model.generate(prompt, 8), by_prefix(model, prompt, 8, greedy))
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
        sample = categorical(2.0, generator=generator.manual_seed(5))
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
    sample = categorical(**cut, generator=torch.Generator().manual_seed(0))
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
        return model.generate(prompt, 20, categorical(generator=generator))

    first = drawn(1)
    torch.rand(7)
    assert torch.equal(drawn(1), first)
    assert not torch.equal(drawn(2), first)
    state = torch.get_rng_state()
    drawn(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_samplers_choose_a_token_for_each_row_of_logits() -> None:
    """Of (B, ..., vocabulary): several tokens may make one input."""
    logits = torch.full((2, 3, 5), -math.inf)
    want = torch.tensor([[0, 4, 2], [1, 1, 3]])
    logits.scatter_(-1, want[..., None], 0.0)
    assert torch.equal(greedy(logits), want)
    assert torch.equal(categorical(top_k=2)(logits), want)


def test_greedy_is_the_first_of_the_best() -> None:
    assert greedy(torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 3.0]])).tolist() == [0, 1]


def of_reals() -> S4Model:
    return S4Model(torch.nn.Linear(3, 4), [S4Block(S4Layer(4, 8))], torch.nn.Linear(4, 7))


ODD = torch.tensor([[0.0, 1.0, -math.inf], [0.0, math.nan, 1.0], [-math.inf] * 3, [0.0, math.inf, 0.0]])
U = torch.zeros(2, 5, 3)
T = torch.zeros(2, 5, dtype=torch.long)
X = torch.zeros(2, 4, 8)
ERRORS: dict[str, tuple[Callable[[], Any], Kind, str]] = {
    "generate both ways": (lambda: small(both=True).generate(T, 3), ValueError, "bidirectional"),
    "generate after pooling": (lambda: small("mean").generate(T, 3), ValueError, "pooling.*mean"),
    "generate from nothing": (lambda: small().generate(T[:, :0], 3), ValueError, r"prompt.*\(2, 0\)"),
    "generate without batch": (lambda: small().generate(T[0], 3), ValueError, r"prompt.*\(5,\)"),
    "generate from a list": (lambda: small().generate([1], 2), EITHER, "prompt.*list"),
    # At the call, not at the first `next`.
    "stream from a list": (lambda: small().stream([1]), EITHER, "prompt.*list"),
    "stream after pooling": (lambda: small("mean").stream(T), ValueError, "pooling.*mean"),
    "stream by a number": (lambda: small().stream(T, 5), TypeError, "sample.*5"),
    "stream from a layer's state": (lambda: small().stream(T, state=X), EITHER, "state"),
    "stream at no rate": (lambda: small().stream(T, rate=0.0), ValueError, "rate.*0"),
    "generate by a number": (lambda: small().generate(T, 2, 5), TypeError, "sample.*5"),
    "generate by categorical itself": (
        lambda: small().generate(T, 2, categorical),
        TypeError,
        r"sample.*got categorical.*call categorical\(\)",
    ),
    "stream of reals by nothing": (lambda: of_reals().stream(U), ValueError, "sample.*float32.*None.*tokens"),
    "stream of reals by greedy": (
        lambda: of_reals().stream(U, greedy),
        ValueError,
        "sample.*float32.*greedy.*tokens",
    ),
    "generate reals by tokens": (
        lambda: of_reals().generate(U, 2, categorical()),
        ValueError,
        r"sample.*\(2, 3\), got \(2,\)",
    ),
    "generate reals of another width": (
        lambda: of_reals().generate(U, 2, lambda y: y),
        ValueError,
        r"sample.*\(2, 3\), got \(2, 7\)",
    ),
    "generate reals of another dtype": (
        lambda: of_reals().generate(U, 2, lambda y: y[:, :3].double()),
        TypeError,
        "input of the encoder.*float32.*float64",
    ),
    "stop reals at a token": (
        lambda: of_reals().stream(U, first_three, stop=3),
        TypeError,
        r"stop must be a function.*\(batch,\), got 3",
    ),
    "stop at two tokens": (
        lambda: small().stream(T, stop=[1, 2]),
        TypeError,
        r"stop must be a token, or a function.*\[1, 2\]",
    ),
    "stop beyond all tokens": (lambda: small().stream(T, stop=2**70), ValueError, "stop.*at most"),
    "pad tokens by a half": (lambda: small().stream(T, stop=1, pad=0.5), TypeError, r"pad.*int64.*0\.5"),
    "pad tokens by nan": (lambda: small().stream(T, stop=1, pad=math.nan), TypeError, "pad.*int64.*nan"),
    "logits of nan": (lambda: categorical()(ODD[:2]), ValueError, "logits.*NaN.*in 1 rows"),
    "logits of nothing": (lambda: categorical()(ODD[2:]), ValueError, "logits.*only -inf in 2 rows"),
    "logits of one row": (lambda: categorical()(ODD[0]), ValueError, r"logits.*\(3,\)"),
    "logits without tokens": (lambda: categorical()(ODD[:, :0]), ValueError, r"logits.*\(4, 0\)"),
    "logits a list": (lambda: greedy([0.0]), ValueError, "logits.*list"),
    "generate no tensor": (lambda: small().generate(T, 2, lambda y: 3), ValueError, "sample.*int"),
    "generate one of two": (
        lambda: small().generate(T, 2, lambda y: T[:1, 0]),
        ValueError,
        r"sample.*\(1,\)",
    ),
    "stop a word": (lambda: small().generate(T, 2, stop="a"), EITHER, "stop.*a"),
    "stop at a negative token": (lambda: small().generate(T, 2, stop=-1), ValueError, "stop.*-1"),
    "stop by one truth": (lambda: small().generate(T, 2, stop=lambda y: True), ValueError, "stop.*2.*bool"),
    "stop by numbers": (lambda: small().generate(T, 2, stop=lambda y: y), ValueError, "stop.*int64"),
    "stop of another shape": (
        lambda: small().generate(T, 2, stop=lambda y: y[:1] == 0),
        ValueError,
        r"stop.*\(1,\)",
    ),
    "pad a word": (lambda: small().generate(T, 2, stop=1, pad="a"), EITHER, "pad.*a"),
    "generate from a layer's state": (lambda: small().generate(T, 2, state=X), EITHER, "state"),
    "generate from another batch's state": (
        lambda: small().generate(T, 2, state=small().initial_state(3)),
        ValueError,
        "state",
    ),
    "generate from an empty prompt": (
        lambda: small().generate(T, 2, lengths=torch.tensor([0, 5])),
        ValueError,
        r"lengths.*\[0, 5\]",
    ),
    "generate from more than there is": (
        lambda: small().generate(T, 2, lengths=torch.tensor([1, 6])),
        ValueError,
        r"lengths.*\[1, 6\]",
    ),
    "half a step": (lambda: small().generate(T, 2.5), EITHER, r"steps.*2\.5"),
    "negative steps": (lambda: small().generate(T, -1), ValueError, "steps.*-1"),
    "a seed as generator": (lambda: categorical(generator=5), TypeError, "generator.*5"),
    "temperature": (lambda: categorical(0.0), ValueError, "temperature.*0"),
    "temperature a word": (lambda: categorical("a"), EITHER, "temperature.*a"),
    "half a top_k": (lambda: categorical(top_k=2.5), EITHER, r"top_k.*2\.5"),
    "top_p a word": (lambda: categorical(top_p="a"), EITHER, "top_p.*a"),
    "top_k": (lambda: categorical(top_k=0), ValueError, "top_k.*0"),
    "top_p": (lambda: categorical(top_p=1.5), ValueError, r"top_p.*1\.5"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "kind", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], Any], kind: Kind, match: str) -> None:
    refuses(kind, match, call)
