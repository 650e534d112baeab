"""s4.transformers: configs, models and states in the hands of transformers are what they are in ours."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import oracle
import pytest
import torch
from stacks import build, inputs, small, tensors, trained
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model, State

st = pytest.importorskip("s4.transformers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TINY = {"vocab_size": 11, "hidden_size": 6, "num_hidden_layers": 2, "d_state": 8, "dt_min": 0.01}
SMALL = {"hidden_size": 4, "num_hidden_layers": 2}  # of `small`


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def language(**options: Any) -> Any:
    """In float64, away from the initialisation of embeddings, whose logits are all but equal."""
    return st.S4ForCausalLM(st.S4Config(**TINY, initializer_range=1.0, **options)).double().eval()


def classifier(**options: Any) -> Any:
    return st.S4ForSequenceClassification(st.S4Config(**{**TINY, "num_labels": 3, **options})).double().eval()


def forget(monkeypatch: pytest.MonkeyPatch, stand_in: ModuleType | None) -> None:
    """As if s4.transformers were not loaded yet, and transformers were that."""
    for name in [name for name in sys.modules if name.startswith("s4.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", stand_in)  # type: ignore[arg-type]


def test_without_transformers_or_with_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, None)
    with pytest.raises(ImportError, match=r"5\.4 or newer: pip install 's4-pytorch\[transformers\]'$"):
        import s4.transformers.installed
    old = ModuleType("transformers")
    old.__version__ = "4.57.6"
    forget(monkeypatch, old)
    with pytest.raises(ImportError, match=r"5\.4 or newer.*version 4\.57\.6 is installed"):
        import s4.transformers.installed  # noqa: F401


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be an integer, got 2.5"),
        ({"variant": "s4d"}, "variant must be 'dplr' or 'diag'"),
        ({"init": "lin"}, "init must be one of 'legs', 'legt', 'fout' for variant='dplr', got 'lin'"),
        ({"dropout": 1.0}, "dropout must be below 1"),
        ({"pooling": "none"}, "pooling must be one of 'mean', 'last', got 'none'"),
        ({"d_state": 7}, "d_state must be even"),
        ({"use_cache": 1}, "use_cache must be True or False, got 1"),
        ({"s4_model": {"blocks": []}}, "must be"),
        (
            {"s4_model": small().config()},
            "hidden_size must be 4, as s4_model has it, got 256: S4Config.from_s4",
        ),
        ({"s4_model": small("last").config(), **SMALL}, "pooling must be 'last', as s4_model has it"),
        ({"format": 1, "s4": "0.1.0", "type": "S4Model", "config": {}}, "s4's own: S4Model.from_pretrained"),
    ],
)
def test_configs_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        st.S4Config(**options)


@pytest.mark.usefixtures("unchecked")
def test_a_model_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="d_input must be 0, got 3"):
        st.S4ForCausalLM(st.S4Config(**TINY, d_input=3))
    with pytest.raises(ValueError, match="needs causal layers"):
        st.S4ForCausalLM(st.S4Config(**TINY, bidirectional=True))
    with pytest.raises(ValueError, match=r"nn\.Embedding and pooling='none', got Embedding and 'mean'"):
        st.S4ForCausalLM.from_s4(small("mean"))
    with pytest.raises(ValueError, match="with pooling 'mean' or 'last', got 'none'"):
        st.S4ForSequenceClassification.from_s4(small())
    with pytest.raises(TypeError, match="model must be an S4Model, got S4ForCausalLM"):
        st.S4ForCausalLM.from_s4(language())
    odd = S4Model(nn.Embedding(7, 4), [S4Block(S4Layer(4, 8))], nn.Linear(4, 7), norm=own_norm())
    with pytest.raises(ValueError, match=r"norm is .*Own"):
        st.S4ForCausalLM.from_s4(odd)


def own_norm() -> nn.Module:
    class Own(nn.LayerNorm):
        pass

    return Own(4)


@pytest.mark.promise(
    "other libraries",
    "`s4.transformers`: an `S4Model` as a model of transformers, in its folders and back, with equal outputs",
)
@pytest.mark.parametrize("kind", ["tokens", "tied", "numbers", "both", "uneven"])
def test_an_s4_model_goes_through_transformers(kind: str, tmp_path: Path) -> None:
    if kind in ("tokens", "tied"):
        plain = S4Model(
            nn.Embedding(11, 6),
            [S4Block(S4Layer(6, 8, variant="diag", init="lin"), norm="rms", d_ff=9) for _ in range(2)],
            nn.Linear(6, 11, bias=False),
            norm=nn.RMSNorm(6),
        ).double()
        if kind == "tied":
            plain.decoder.weight = plain.encoder.weight
        auto, u = transformers.AutoModelForCausalLM, {"input_ids": inputs(3, True)}
    else:
        stack, block = ("mixed", "final norm") if kind == "uneven" else ("dplr", "postnorm")
        plain = build("mixed" if kind == "numbers" else stack, block, "mean", both=kind == "both")
        if kind == "numbers":
            plain = S4Model(
                nn.Linear(3, 6), [S4Block(S4Layer(6, 8))], nn.Linear(6, 5), pooling="last"
            ).double()
        auto, u = transformers.AutoModelForSequenceClassification, {"input_values": inputs(3)}
    plain.eval()
    theirs = (st.S4ForCausalLM if "input_ids" in u else st.S4ForSequenceClassification).from_s4(plain)
    assert (theirs.config.s4_model is None) == (kind in ("tokens", "tied"))
    assert theirs.config.tie_word_embeddings == (kind == "tied")
    theirs.save_pretrained(tmp_path)
    back = auto.from_pretrained(tmp_path, dtype=torch.float64)
    want = plain(*u.values())
    for model in (theirs, back):
        assert type(model) is type(theirs)
        oracle.close(model(**u, use_cache=False).logits, want, 1e-9)  # memory that is aligned otherwise
        oracle.close(model.s4()(*u.values()), want, 1e-9)
        assert model.s4().blocks[0] is model.model.blocks[0]
    assert back.s4().config() == plain.config()
    with torch.no_grad():
        plain.blocks[0].layer.D.add_(1)  # a copy has numbers of its own
    oracle.close(theirs.s4()(*u.values()), want, 1e-9)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="s4's own"):
        st.S4ForCausalLM.from_pretrained(tmp_path)


def test_models_begin_as_ours(tmp_path: Path) -> None:
    """Made or loaded, on meta too: a layer has its own first values where no others are loaded."""
    model = st.S4ForCausalLM(st.S4Config(**TINY, initializer_range=0.5))
    own = S4Layer(6, 8, dt_min=0.01)
    layer = model.model.blocks[1].layer
    for name in ("log_A_real", "A_imag", "P", "B"):
        assert torch.equal(getattr(layer, name), getattr(own, name)), name
    assert layer.dt.min() >= 0.0099
    assert layer.dt.max() <= 0.101
    assert 0.3 < model.model.encoder.weight.std() < 0.7
    assert model.lm_head.weight.abs().max() <= 6**-0.5  # torch's own
    part = {name: p for name, p in model.state_dict().items() if not name.startswith("model.blocks.1.")}
    del part["model.blocks.0.layer.C"], part["model.norm.bias"]
    model.save_pretrained(tmp_path, state_dict=dict(part))
    back, found = st.S4ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(found["missing_keys"]) == set(model.state_dict()) - set(part)
    for name, p in back.state_dict().items():
        assert torch.equal(p, model.state_dict()[name]) == (
            name in part or not name.endswith((".C", ".D", "log_dt", "mixer.0.weight", "mixer.0.bias"))
        ), name
    assert 0.2 < back.model.blocks[1].layer.C.std() < 1.5


@pytest.mark.promise(
    "other libraries",
    "`s4.transformers`: `from_pretrained` in bfloat16, where `log_dt` and `A_imag` stay float32",
)
def test_loaded_in_half_precision(tmp_path: Path) -> None:
    model = language().float()
    model.save_pretrained(tmp_path)
    half = st.S4ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in half.named_parameters():
        exact = name.endswith(("log_dt", "A_imag"))
        assert p.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert torch.equal(p, model.get_parameter(name).to(p.dtype)), name
    ids = inputs(2, True)
    oracle.close(half(ids, use_cache=False).logits.float(), half.s4()(ids).float(), 2**-6)
    assert half.generate(ids, max_new_tokens=2).shape == (2, ids.shape[1] + 2)


def places(how: str, batch: int, L: int) -> Tensor:
    """(batch, L), True at inputs: of row b the last L-2b, the first, or others; the last row has one."""
    mask = torch.ones(batch, L, dtype=torch.bool)
    for b in range(1, batch):
        if how == "left":
            mask[b, : L - 1 if b == batch - 1 else 2 * b] = False
        elif how == "right":
            mask[b, 1 if b == batch - 1 else L - 2 * b :] = False
        else:
            mask[b] = torch.rand(L) < 0.6
            mask[b, b] = True
    return mask


@pytest.mark.promise(
    "other libraries",
    "`s4.transformers`: `attention_mask` with padding on the left, on the right and between, exactly",
)
@pytest.mark.parametrize("how", ["left", "right", "anywhere"])
@pytest.mark.parametrize("kind", ["features", "mean", "last", "both ways"])
def test_padding_counts_for_nothing(how: str, kind: str) -> None:
    """Each row as if alone, with nan where it is masked; dtypes of masks make no difference."""
    model = st.S4ForSequenceClassification.from_s4(
        trained("mixed", "batch", "last" if kind == "last" else "mean", both=kind == "both ways")
    )
    u, mask = inputs(4), places(how, 4, 29)
    u[~mask] = torch.nan
    alone = [row[m][None] for row, m in zip(u, mask, strict=True)]
    if kind == "features":
        out = model.model(input_values=u, attention_mask=mask.long(), output_hidden_states=True)
        for b, row in enumerate(alone):
            want = model.model(input_values=row, output_hidden_states=True)
            for got, w in zip(out.hidden_states, want.hidden_states, strict=True):
                oracle.close(got[b, mask[b]], w[0], 1e-9)
                assert not got[b, ~mask[b]].any()
            kept = out[st.installed.CACHE].state.select([b])
            for g, w in zip(tensors(kept), tensors(want[st.installed.CACHE].state), strict=True):
                oracle.close(g, w, 1e-9)
        assert out.hidden_states[-1] is out.last_hidden_state
        return
    got = model(input_values=u, attention_mask=mask.double()).logits
    oracle.close(got, torch.cat([model(input_values=row).logits for row in alone]), 1e-9)


def test_padding_in_training() -> None:
    """The statistics of a batch norm do not depend on the side of the padding, nor are they of it."""
    kinds = []
    for how in ("left", "right"):
        torch.manual_seed(1)
        model = classifier(norm="batch").train()
        ids, mask = torch.zeros(4, 29, dtype=torch.long), places(how, 4, 29)
        ids[mask] = torch.arange(int(mask.sum())) % 11
        loss = model(ids, mask, labels=torch.tensor([0, 1, 2, 0])).loss
        loss.backward()
        kinds.append([loss, *(p.grad for p in model.parameters()), *model.buffers()])
    for left, right in zip(*kinds, strict=True):
        oracle.close(left, right, 1e-9)


@pytest.mark.usefixtures("unchecked")
def test_masks_that_are_none() -> None:
    model, ids = language(), inputs(2, True)
    for mask, error, message in (
        (torch.ones(2, 28), ValueError, r"attention_mask must have shape \(2, 29\), got \(2, 28\)"),
        (torch.ones(2, 1, 29, 29), ValueError, "attention_mask must have shape"),
        ([[1] * 29] * 2, TypeError, "attention_mask must be a tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            model(ids, mask)
    empty = model(ids, torch.zeros(2, 29))
    assert not empty[st.installed.CACHE].state.length.any()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_state_goes_in_and_out(name: str) -> None:
    model, ids = language(), inputs(3, True)
    want, state = model.s4()(ids, return_state=True)
    first = model(ids[:, :10], use_cache=True)
    cache = first[st.installed.CACHE]
    assert cache.get_seq_length() == 10
    assert cache.batch_size == 3
    ahead = model(ids[:, 10:28], use_cache=False, **{name: cache})
    assert ahead.get(st.installed.CACHE) is None
    assert cache.get_seq_length() == 10, "a cache that is only read stays as it is"
    second = model(ids[:, 10:28], **{name: cache})
    assert torch.equal(ahead.logits, second.logits)
    assert second[st.installed.CACHE] is cache
    last = model(ids[:, 28:], **{name: cache.state})  # an s4.State is taken as it is
    oracle.close(torch.cat([first.logits, second.logits, last.logits], 1), want, 1e-9)
    for got, w in zip(tensors(last[st.installed.CACHE].state), tensors(state), strict=True):
        oracle.close(got, w, 1e-9)
    assert model.train()(ids).get(st.installed.CACHE) is None, "in training a state is kept only if asked for"
    pooled = classifier()
    parts = pooled(ids[:, :10], use_cache=True)
    parts = pooled(ids[:, 10:], **{name: parts[st.installed.CACHE]})
    oracle.close(parts.logits, pooled(ids).logits, 1e-9)


@pytest.mark.usefixtures("unchecked")
def test_states_that_do_not_fit() -> None:
    model, ids = language(), inputs(3, True)
    state = model.s4().initial_state(3)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=state, past_key_values=state)
    with pytest.raises(ValueError, match="cache must hold 2 layers, got 1"):
        model(ids, cache=state._replace(layers=state.layers[:1]))
    with pytest.raises(ValueError, match="state must have shape"):
        model(ids, cache=state.select([0]))
    with pytest.raises(ValueError, match="return_state needs a causal layer"):
        classifier(bidirectional=True)(ids, use_cache=True)
    with pytest.raises(ValueError, match="one of input_ids, inputs_embeds and"):
        model.model()
    with pytest.raises(TypeError, match=r"must be an S4Cache or an s4\.State, got DynamicCache"):
        model(ids, cache=transformers.DynamicCache())
    cache = st.S4Cache(state)
    with pytest.raises(NotImplementedError, match="cannot forget"):
        cache.crop(-1)


def test_caches_have_the_methods_of_theirs() -> None:
    model, ids = language(), inputs(3, True)
    cache = model(ids)[st.installed.CACHE]
    state: State = cache.state
    assert isinstance(cache, transformers.Cache)
    assert len(cache) == 2
    assert repr(cache) == "S4Cache(layers=2, seen=29)"
    assert not cache.is_compileable
    assert not cache.is_croppable
    other: dict[str, tuple[Callable[[Any], None], list[int]]] = {
        "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        "select": (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    }
    for change, rows in other.values():
        changed = copy.copy(cache)
        change(changed)
        for got, w in zip(tensors(changed.state), tensors(state.select(rows)), strict=True):
            assert torch.equal(got, w)
    cache.reset()
    assert cache.state is None
    assert cache.get_seq_length() == 0


def test_losses_hidden_states_and_tuples() -> None:
    model, ids = language(), inputs(3, True)
    labels = ids.clone()
    labels[0, :9] = -100
    out = model(ids, labels=labels, output_hidden_states=True)
    logits = model.s4()(ids)
    want = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    oracle.close(out.loss, want, 1e-6)
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    oracle.close(summed, want * (labels[:, 1:] != -100).sum() / 7, 1e-6)
    assert st.installed.CACHE not in out  # not asked for, and of no use to a loss
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.encoder(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    loss, same, hidden = model(ids, labels=labels, output_hidden_states=True, return_dict=False)
    oracle.close(loss, out.loss, 1e-6)
    oracle.close(same, out.logits, 1e-9)
    assert len(hidden) == 3
    for keep in (2, torch.tensor([27, 28])):
        oracle.close(model(ids, use_cache=False, logits_to_keep=keep).logits, out.logits[:, -2:], 1e-9)
    embedded = model(inputs_embeds=model.model.encoder(ids), use_cache=False).logits
    oracle.close(embedded, out.logits, 1e-9)
    several = classifier(problem_type="multi_label_classification")
    got = several(ids, labels=torch.eye(3).double())
    want = nn.functional.binary_cross_entropy_with_logits(got.logits, torch.eye(3).double())
    oracle.close(got.loss, want, 1e-9)


@pytest.mark.promise(
    "other libraries", "`s4.transformers`: `gradient_checkpointing_enable` and resized embeddings"
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_resizing(reentrant: bool, tmp_path: Path) -> None:
    model, ids = language(tie_word_embeddings=True).train(), inputs(3, True)
    assert model.lm_head.weight is model.model.encoder.weight
    calls, grads = [], []
    model.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == 3
    for plain, again in zip(*grads, strict=True):
        oracle.close(again, plain, 1e-9)
    model.eval().resize_token_embeddings(13, mean_resizing=False)
    model.save_pretrained(tmp_path)
    back = st.S4ForCausalLM.from_pretrained(tmp_path)
    assert back.lm_head.weight is back.model.encoder.weight
    assert back(ids + 2).logits.shape == (3, 29, 13)
    uneven = st.S4ForSequenceClassification.from_s4(trained("mixed", "final norm", "mean", tokens=True))
    uneven.resize_token_embeddings(13, mean_resizing=False)
    uneven.save_pretrained(tmp_path)
    assert st.S4ForSequenceClassification.from_pretrained(tmp_path).model.encoder.weight.shape == (13, 6)
