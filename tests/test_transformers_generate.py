"""s4.transformers: `generate` with its samplers and beams is ours, and costs a step a token."""

import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from stacks import inputs, tensors
from torch import Tensor

from s4 import S4Block

st = pytest.importorskip("s4.transformers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
NEW = 6


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
        yield


def make(layers: int = 2) -> Any:
    """In float64, with logits that differ enough for no two of them to be equal by rounding."""
    config = st.S4Config(
        vocab_size=11, hidden_size=6, num_hidden_layers=layers, d_state=8, dt_min=0.01, initializer_range=1.0,
        pad_token_id=0, bos_token_id=2,
    )  # fmt: skip
    found = st.S4ForCausalLM(config).double().eval()
    found.lm_head.weight.data.mul_(5)
    return found


@pytest.fixture
def model() -> Any:
    return make()


@pytest.fixture
def ids() -> Tensor:
    return inputs(3, True, 9).clamp(min=1)


def ragged(ids: Tensor) -> dict[str, Tensor]:
    """The last 9, 4 and 1 of them, padded on the left."""
    mask = torch.arange(9) >= 9 - torch.tensor([[9], [4], [1]])
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


class Counted:
    """How often blocks are run over sequences, their lengths, and how often they make a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lengths: list[int] = []
        self.steps = 0
        forward, step = S4Block.forward, S4Block.step

        def counted_forward(block: S4Block, x: Tensor, *others: Any, **options: Any) -> Any:
            self.lengths.append(x.shape[1])
            return forward(block, x, *others, **options)

        def counted_step(block: S4Block, *others: Any, **options: Any) -> Any:
            self.steps += 1
            return step(block, *others, **options)

        monkeypatch.setattr(S4Block, "forward", counted_forward)
        monkeypatch.setattr(S4Block, "step", counted_step)


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 8, "top_p": 0.95},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beams drawn": {"num_beams": 3, "do_sample": True, "length_penalty": 0.5},
    "penalties": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "chunks": {"do_sample": False, "prefill_chunk_size": 4},
}


@pytest.mark.promise(
    "other libraries",
    "`s4.transformers`: `generate`, greedy, by sampling and with beams, of prompts of several lengths, "
    "at one step a token",
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "left-padded"])
def test_a_step_a_token(
    model: Any, ids: Tensor, way: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token what running all of it again for each token gives, and of a row what it gives alone."""
    prompts = ragged(ids) if padded else {"input_ids": ids}
    counted, made = Counted(monkeypatch), []
    for cached in (True, False):
        torch.manual_seed(3)
        options = {**WAYS[way], "use_cache": cached}
        if not cached:
            options.pop("prefill_chunk_size", None)
        made.append(model.generate(**prompts, max_new_tokens=NEW, **options))
        if cached:
            chunks = way == "chunks"  # of 4, 4 and 1, which is a step
            assert counted.lengths == ([4] * 4 if chunks else [9, 9])
            assert counted.steps == 2 * (NEW - 1 + chunks)
    assert torch.equal(*made)
    assert made[0].shape[1] == 9 + NEW
    if way in ("greedy", "beams", "penalties", "chunks") and padded:
        count = WAYS[way].get("num_return_sequences", 1)
        for b, length in enumerate((9, 4, 1)):
            alone = model.generate(ids[b : b + 1, 9 - length :], max_new_tokens=NEW, **WAYS[way])
            assert torch.equal(made[0][b * count : (b + 1) * count, 9:], alone[:, length:])
    if way == "greedy" and not padded:
        assert torch.equal(made[0][:, 9:], model.s4().generate(ids, NEW))


@pytest.mark.promise(
    "other libraries",
    "`s4.transformers`: streamers, stopping criteria and end tokens of `generate`; it goes on from a state",
)
def test_ends_streams_and_scores(model: Any, ids: Tensor) -> None:
    want = model.s4().generate(ids, NEW)
    end = int(want[1, 2])
    got = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=end)
    own = model.s4().generate(ids, NEW, stop=end, pad=0)
    assert torch.equal(got[:, 9:], own)
    assert (own[1, 3:] == 0).all()

    class Third(transformers.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    class Kept(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.tokens.append(value)

        def end(self) -> None:
            self.tokens.append(torch.tensor([-1]))

    kept = Kept()
    got = model.generate(
        ids, max_new_tokens=NEW, do_sample=False, streamer=kept, stopping_criteria=[Third()],
        return_dict_in_generate=True, output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    assert torch.equal(got.sequences[:, 9:], want[:, :3])
    assert torch.equal(torch.stack(kept.tokens[1:-1], 1), want[:, :3])
    logits = model.s4()(got.sequences[:, :-1])[:, 8:]
    oracle.close(torch.stack(got.logits, 1), logits, 1e-6)  # which generate rounds to float32
    assert [h[0].shape[1] for h in got.hidden_states] == [9, 1, 1]
    state = model.s4()(got.sequences[:, :-1], return_state=True)[1]
    for x, w in zip(tensors(got[st.installed.CACHE].state), tensors(state), strict=True):
        oracle.close(x, w, 1e-9)


@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings(model: Any, ids: Tensor, beams: int) -> None:
    """`generate` hands the tokenizer that they need on to the model."""
    letters = "abcdefghijk"
    tool = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(letters)}, "a"))
    tool.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tool.decoder = tokenizers.decoders.Fuse()
    told = {"tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=tool)}
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": beams}
    want = model.generate(ids[:1], **options)[0].tolist()
    end = want[11]
    got = model.generate(ids[:1], **options, **told, stop_strings=letters[end])[0].tolist()
    if beams == 1:
        assert got == want[: 10 + want[9:].index(end)]
    assert got[-1] == end


def test_going_on_from_a_state(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second turn of a conversation costs what is new in it."""
    cache = st.S4Cache()
    options = {"max_new_tokens": NEW, "do_sample": False, st.installed.CACHE: cache}
    first = model.generate(**ragged(ids), **options)
    assert cache.get_seq_length() == 9 + NEW - 1  # the last token has not been read
    asked = torch.cat([first, ids[:, :3]], 1)
    mask = torch.cat([ragged(ids)["attention_mask"], torch.ones(3, NEW + 3, dtype=torch.long)], 1)
    want = model.generate(asked, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    counted = Counted(monkeypatch)
    got = model.generate(asked, attention_mask=mask, **options)
    assert torch.equal(got, want)
    assert counted.lengths == [4, 4]
    with pytest.raises(ValueError, match="needs all tokens so far and new ones behind them"):
        model.generate(ids[:, :3], **options)
    state = model.s4()(ids, return_state=True)[1]
    options[st.installed.CACHE] = state
    got = model.generate(torch.cat([ids, ids[:, :3]], 1), **options)
    assert torch.equal(got[:, 12:], model.s4().generate(torch.cat([ids, ids[:, :3]], 1), NEW))
    beams = {"num_beams": 2, "max_new_tokens": 3}
    want = model.generate(torch.cat([ids, ids[:, :3]], 1), **beams)
    cache = st.S4Cache(state)
    with pytest.raises(
        ValueError, match=r"must hold 6 sequences, got 3: .*cache\.batch_repeat_interleave\(2\)"
    ):
        model.generate(torch.cat([ids, ids[:, :3]], 1), **beams, **{st.installed.CACHE: cache})
    cache.batch_repeat_interleave(2)
    assert torch.equal(
        model.generate(torch.cat([ids, ids[:, :3]], 1), **beams, **{st.installed.CACHE: cache}), want
    )
    embedded = model.generate(inputs_embeds=model.model.encoder(ids), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(embedded, model.s4().generate(ids, NEW))


@pytest.mark.promise(
    "torch.compile",
    "`s4.transformers`: masked batches and calls with a cache, a graph each, and `generate` with them",
)
@pytest.mark.usefixtures("unchecked")
def test_compiled(ids: Tensor) -> None:
    """A mask that a graph cannot look into gives what it gives where it can be seen."""
    model, asked = make(1), {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    want = model.generate(**ragged(ids), **asked, output_logits=True)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    got = model.generate(**ragged(ids), **asked, output_logits=True)
    assert torch.equal(got.sequences, want.sequences)
    oracle.close(torch.stack(got.logits), torch.stack(want.logits), 1e-6)


@pytest.mark.promise(
    "other libraries",
    "`s4.transformers`: assisted and contrastive decoding, static caches, prompts padded on the right",
    supported=False,
)
def test_what_generate_refuses(model: Any, ids: Tensor) -> None:
    right = {name: value.flip(1) for name, value in ragged(ids).items()}
    for options, message in (
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful models"),
        ({"assistant_model": model}, "assisted generation is not supported with stateful models"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "requires `trust_remote_code=True`"),
        ({"cache_implementation": "static"}, "cache_implementation must be None.* got 'static'"),
        ({"no_such_option": 1}, "no_such_option"),
        (right, "prompts that are padded on the left.*padding_side = 'left'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(
                **{"input_ids": ids[:1] if options is not right else ids, **options}, max_new_tokens=2
            )
