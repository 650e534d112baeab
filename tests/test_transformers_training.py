"""s4.transformers: Trainer, Auto classes and pipelines, with models and a tokenizer made here."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from torch import Tensor, nn

from s4 import param_groups

st = pytest.importorskip("s4.transformers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
WORDS = list("abcdefgh")


@pytest.fixture(scope="module", autouse=True)
def as_before() -> Iterator[None]:
    """No word of transformers, and what accelerate sets for the whole process is undone."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
        yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of eight words."""
    known = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def config(**options: Any) -> Any:
    return st.S4Config(
        vocab_size=11, hidden_size=16, num_hidden_layers=2, d_state=8, pad_token_id=0, **options
    )


def texts(n: int = 16) -> list[dict[str, Tensor]]:
    """Words in their order, over and over."""
    rows = [(torch.arange(12) + i) % 8 + 3 for i in range(n)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    """Of 20 steps, with the learning rates of s4."""
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=8,
        max_steps=20, lr_scheduler_type="constant", logging_steps=5, save_steps=10, **options,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    return transformers.Trainer(
        model, arguments, train_dataset=texts(), eval_dataset=texts(5), optimizers=(optimizer, None)
    )


@pytest.fixture(scope="module")
def trained(as_before: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Trainer after its 20 steps, with their folder."""
    torch.manual_seed(0)
    found = trainer(st.S4ForCausalLM(config()), tmp_path_factory.mktemp("run"))
    found.train()
    return found


@pytest.mark.promise(
    "other libraries",
    "`s4.transformers`: `Trainer`, with `param_groups`, checkpoints, resume and evaluation",
)
def test_trained_and_resumed(trained: Any, tmp_path: Path) -> None:
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    assert [group["lr"] for group in trained.optimizer.param_groups] == [1e-3, 1e-2, 1e-2]
    evaluated = trained.evaluate()["eval_loss"]
    rows = torch.stack([row["input_ids"] for row in texts(5)])
    with torch.no_grad():
        logits = trained.model.s4().eval()(rows)
    want = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    oracle.close(torch.tensor(evaluated), want, 1e-5)
    again = trainer(st.S4ForCausalLM(config()), tmp_path)
    again.train(resume_from_checkpoint=str(Path(trained.args.output_dir) / "checkpoint-10"))
    for (name, p), w in zip(again.model.named_parameters(), trained.model.parameters(), strict=True):
        oracle.close(p, w, 1e-5, name)
    asked = [{"input_ids": row["input_ids"]} for row in texts(5)]
    trained.model.config.use_cache = True  # which Trainer turns off
    predicted = trained.predict(asked).predictions  # no cache among them
    oracle.close(torch.from_numpy(predicted), logits, 1e-5)


def test_losses_of_the_trainer(trained: Any, tmp_path: Path) -> None:
    """Smoothed labels are shifted, as those of language models that transformers knows; steps accumulate."""
    model = trained.model.eval()
    rows = torch.stack([row["input_ids"] for row in texts()])
    with torch.no_grad():
        logits = model(rows).logits[:, :-1].flatten(0, 1)
        smoothed = trainer(model, tmp_path, label_smoothing_factor=0.1)
        got = smoothed.compute_loss(model, {"input_ids": rows, "labels": rows})
    want = nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), label_smoothing=0.1)
    oracle.close(got, want, 1e-5)
    whole = []
    for batch, accumulated in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        one = trainer(st.S4ForCausalLM(config()), tmp_path)
        one.optimizer = torch.optim.SGD(one.model.parameters(), lr=0.1)
        one.args.per_device_train_batch_size, one.args.gradient_accumulation_steps = batch, accumulated
        one._train_batch_size, one.args.max_steps, one.args.save_strategy = batch, 2, "no"
        for i, row in enumerate(one.train_dataset):  # batches of unequal weight
            row["labels"] = row["labels"].where(torch.arange(12) >= 10 * (i % 2), -100)
        one.train()
        whole.append(list(one.model.parameters()))
    for p, w in zip(*whole, strict=True):
        oracle.close(p, w, 1e-5)


@pytest.mark.promise(
    "other libraries",
    "`s4.transformers`: `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`, "
    "`AutoModelForSequenceClassification`, and the pipelines of text",
)
def test_auto_classes_and_pipelines(trained: Any, tokenizer: Any, tmp_path: Path) -> None:
    trained.save_model(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is st.S4Config
    rows = torch.stack([row["input_ids"] for row in texts(3)])
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(base) is st.S4BaseModel
    want = trained.model.eval().model(rows, use_cache=False).last_hidden_state
    oracle.close(base(rows, use_cache=False).last_hidden_state, want, 1e-6)
    writer = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(writer.model) is st.S4ForCausalLM
    made = writer(
        ["a b c", "f g h a b"], batch_size=2, max_new_tokens=5, do_sample=False, return_full_text=False
    )
    assert [one[0]["generated_text"].split() for one in made] == [list("defgh"), list("cdefg")]
    names = {0: "vowel", 1: "consonant", 2: "none"}
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, id2label=names)
    assert type(judge) is st.S4ForSequenceClassification
    assert torch.equal(judge.model.blocks[1].layer.C, trained.model.model.blocks[1].layer.C)
    judge.save_pretrained(tmp_path)
    reader = transformers.pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None)
    words, ids = ["a b", "c d e f g"], {name: i for i, name in names.items()}
    for text, both in zip(words, reader(words, batch_size=2), strict=True):
        p = judge(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0].softmax(0)
        for one in both:
            oracle.close(torch.tensor(one["score"]), p[ids[one["label"]]], 1e-5)


@pytest.mark.promise("other libraries", "`s4.transformers`: `device_map` with parts of a model on the disk")
def test_offloaded(trained: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    trained.model.save_pretrained(tmp_path / "model")
    whole = sum(p.nbytes for p in trained.model.parameters())
    away = st.S4ForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": whole - 700},
        offload_folder=tmp_path / "away",
    )
    assert not [
        part for part in away.hf_device_map if part.startswith("model.blocks") and part.count(".") > 2
    ]
    assert away.model.blocks[1].layer.D.is_meta
    rows = torch.stack([row["input_ids"] for row in texts(3)])
    model = trained.model.eval()
    for options in ({}, {"num_beams": 2}):
        made = [m.generate(rows, max_new_tokens=3, do_sample=False, **options) for m in (away, model)]
        assert torch.equal(*made)
