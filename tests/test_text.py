"""Texts as bytes and as words: tokens, windows and pairs."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

import pyarrow
import pyarrow.parquet
import train
from data import language
from data.base import SequenceData
from data.language import Characters, Words
from data.retrieval import PaperPairs
from data.storage import DataError
from data.text import Reviews
from example_files import OF_LIGHTNING, TINY, WRITERS, fails
from lightning.pytorch import Trainer
from trainer.task import SequenceTask

pytestmark = [
    pytest.mark.usefixtures("own_folder"),
    OF_LIGHTNING,
]

REVIEWS = ["fine", "a ü b", "no\nno", "x" * 12, "日本語テスト"]


def opened(data: SequenceData) -> Any:
    data.prepare_data()
    data.setup("fit")
    return data


def write(folder: Path, **splits: dict[str, list[Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, columns in splits.items():
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}.parquet")
    return folder


def reviews(folder: Path, texts: list[Any], labels: list[Any]) -> Reviews:
    columns = {"text": texts, "label": labels}
    return Reviews(write(folder, train=columns, test=columns), length=10, batch_size=4, validation=0.2)


# Reviews


def test_reviews_are_their_bytes(tmp_path: Path) -> None:
    texts, labels = REVIEWS * 6, [number % 2 for number in range(30)]
    data = opened(reviews(tmp_path / "imdb", texts, labels))
    rows = torch.tensor([3, 1, 4, 0])
    batch = data.transform(data.fetch("test", rows), False)
    tokens = [list(texts[row].encode())[:10] for row in rows.tolist()]
    assert batch.lengths.tolist() == [len(of_one) for of_one in tokens] == [10, 6, 10, 4]
    assert batch.inputs.tolist() == [of_one + [0] * (10 - len(of_one)) for of_one in tokens]
    assert batch.targets.tolist() == [1, 1, 0, 0]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert data.lengths("test").tolist() == [min(10, len(text.encode())) for text in texts]
    parts = [part.tolist() for _, part in data.parts.values()]
    assert sorted(parts[0] + parts[1]) == parts[2] == list(range(30))
    assert Counter(labels[row] for row in parts[1]) == {0: 3, 1: 3}
    # Validation goes by length, so that little is padding; nothing is left out.
    seen = [length for batch in data.val_dataloader() for length in batch.lengths.tolist()]
    assert seen == sorted(min(10, len(texts[row].encode())) for row in parts[1])


def test_reviews_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(reviews(tmp_path / "imdb", REVIEWS * 6, [0, 1] * 15)).fetch("test", torch.arange(30))
    monkeypatch.setattr(Reviews, "build", None)
    again = opened(Reviews(tmp_path / "imdb", batch_size=4, length=10, validation=0.2))
    assert torch.equal(first.inputs, again.fetch("test", torch.arange(30)).inputs)


@pytest.mark.parametrize(
    ("texts", "labels", "said"),
    [
        (["a", None, "b"], [0, 1, 0], "row 1 has no text"),
        (["a", "b", ""], [0, 1, 0], "row 2 of text is empty"),
        (["a", "b", "c"], [0, 1, 2], r"expected labels 0 and 1, got \[0, 1, 2\]"),
        (["a", "b", "c"], [0, 1, -1], r"expected labels 0 and 1, got \[-1, 0, 1\]"),
        (["a", "b", "c"], [0, 1, None], "row 2 has no label"),
        (["a", "b", "c"], [0.0, 1.0, 0.0], "'label' is float64"),
        ([1, 2, 3], [0, 1, 0], "'text' and"),
    ],
)
def test_wrong_reviews(texts: list[Any], labels: list[Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        reviews(tmp_path / "imdb", texts, labels).prepare_data()


def test_missing_columns(tmp_path: Path) -> None:
    folder = write(tmp_path / "imdb", train={"review": ["a"], "label": [0]})
    with pytest.raises(DataError, match=r"no column \['text'\].*'text' and 'label'"):
        Reviews(folder).prepare_data()
    with pytest.raises(DataError, match=r"no column \['text'\]"):
        Words(folder).prepare_data()


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match=r"data\.validation .*0\.7"):
        Reviews(validation=0.7)
    for kind in (Reviews, PaperPairs):
        with pytest.raises(ValueError, match=r"data\.length .*0"):
            kind(length=0)
    with pytest.raises(ValueError, match=r"data\.stride .*16 and 17"):
        Characters(length=16, stride=17)
    with pytest.raises(ValueError, match=r"data\.vocabulary .*1"):
        Words(vocabulary=1)


# Pairs


def write_papers(folder: Path, lines: list[str], name: str = "new_aan_pairs.{}.tsv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval", "test"):
        (folder / name.format(split)).write_text("".join(lines), encoding="utf-8")
    return folder


def test_pairs(tmp_path: Path) -> None:
    lines = [
        '0.0\tP1\tP2\t"one ""quoted"" word"\t"two\ttabs"\n',
        "1.0\tP3\tP4\tabc\tüx\n",
        '1.0\tP5\tP6\t"a\nb"\tlast\n',
    ]
    write_papers(tmp_path / "lra" / "tsv_data", lines)
    data = opened(PaperPairs(tmp_path / "lra", length=9, batch_size=2))
    batch = data.transform(data.fetch("train", torch.tensor([2, 0, 1])), True)
    pairs = [("a\nb", "last"), ('one "quoted" word', "two\ttabs"), ("abc", "üx")]
    tokens = [[list(text.encode())[:9] for text in pair] for pair in pairs]
    assert batch.lengths.tolist() == [[len(text) for text in pair] for pair in tokens]
    assert batch.inputs.tolist() == [[text + [0] * (9 - len(text)) for text in pair] for pair in tokens]
    assert batch.targets.tolist() == [1, 0, 1]
    assert data.lengths("train").tolist() == [9, 3, 4]
    # The model reads each paper without the padding that comes from the other one.
    model = SequenceTask(data.spec, d_model=8, n_layers=1, d_state=4, bidirectional=True).eval()
    alone = data.transform(data.fetch("train", torch.tensor([2])), True)
    torch.testing.assert_close(model(batch)[:1], model(alone))
    a, b = (model.model(alone.inputs[:, i], lengths=alone.lengths[:, i]) for i in range(2))
    compared = model.compare(torch.cat([a, b, a * b, a - b], -1))
    torch.testing.assert_close(model(alone), compared)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0.0\tP1\tP2\tone\n", "label, id1, id2, text1, text2"),
        ("yes\tP1\tP2\tone\ttwo\n", "yes"),
        ("2.0\tP1\tP2\tone\ttwo\n", r"expected labels 0 and 1, got \[-1\]"),
        ("0.5\tP1\tP2\tone\ttwo\n", r"expected labels 0 and 1, got \[-1\]"),
        ("0.0\tP1\tP2\tone\t\n", "row 1 of pairs of papers is empty"),
        ("", "new_aan_pairs.train.tsv"),
    ],
)
def test_wrong_pairs(line: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        PaperPairs(write_papers(tmp_path / "lra", [line])).prepare_data()


def test_pairs_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lra_release\.gz.*data\.path"):
        PaperPairs().prepare_data()
    write_papers(tmp_path / "a", ["0.0\tP1\tP2\tone\ttwo\n"])
    write_papers(tmp_path / "b", ["0.0\tP1\tP2\tone\ttwo\n"])
    with pytest.raises(DataError, match=r"new_aan_pairs\.train\.tsv once, got 2"):
        PaperPairs(tmp_path).prepare_data()


# Characters


@pytest.fixture
def characters(tmp_path: Path) -> tuple[Characters, bytes]:
    text = bytes(np.random.default_rng(0).integers(97, 123, 1000, dtype=np.uint8))
    (tmp_path / "input.txt").write_bytes(text)
    return opened(Characters(tmp_path, length=16, stride=6, batch_size=4, eval_batch_size=3)), text


def test_training_windows_tile_the_text(characters: tuple[Characters, bytes]) -> None:
    data, text = characters
    train_part = text[:900]
    starts = []
    for epoch in range(40):
        batches = data.train_dataloader()
        batches.set_epoch(epoch)
        order = batches.order().tolist()
        starts.append(order[0] % 16)
        assert len(set(order)) == len(order) == 52  # of 55, as batches are whole
        assert {start % 16 for start in order} == {starts[-1]}
        assert max(order) + 17 <= len(train_part)
        assert sorted(order) != order
        if epoch < 2:
            batch = data.transform(next(iter(batches)), True)
            for start, inputs, targets in zip(
                order[:4], batch.inputs.tolist(), batch.targets.tolist(), strict=True
            ):
                assert inputs == [train_part[start + i] for i in range(16)]
                assert targets == [train_part[start + i + 1] for i in range(16)]
    assert len(set(starts)) > 8
    assert set(starts) <= set(range(16))
    again = data.train_dataloader()
    again.set_epoch(3)
    assert again.order()[0] % 16 == starts[3]


@pytest.mark.parametrize(("part", "begin", "end"), [("val", 900, 950), ("test", 950, 1000)])
def test_evaluation_predicts_every_character_once(
    part: str, begin: int, end: int, characters: tuple[Characters, bytes]
) -> None:
    data, text = characters
    batches = [data.transform(batch, False) for batch in getattr(data, f"{part}_dataloader")()]
    scored = [token for batch in batches for row in batch.targets.tolist() for token in row]
    whole = (end - begin) // 6 * 6
    assert scored == list(text[begin : begin + whole])
    # Before what a window scores it has 10 characters, and none that it is to predict.
    inputs = [row for batch in batches for row in batch.inputs.tolist()]
    for number, row in enumerate(inputs):
        first = begin + 6 * number
        assert row == list(text[first - 11 : first + 5])


def test_bits_of_a_uniform_distribution(characters: tuple[Characters, bytes]) -> None:
    data, _ = characters
    model = SequenceTask(data.spec, d_model=4, n_layers=1, d_state=2)
    torch.nn.init.zeros_(model.model.decoder.weight)
    torch.nn.init.zeros_(model.model.decoder.bias)
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    (scores,) = trainer.validate(model, data, verbose=False)
    assert scores["val/bits"] == pytest.approx(8)
    # e^5.5 has 5.5 times the relative error of 5.5.
    assert scores["val/perplexity"] == pytest.approx(256, rel=1e-5)


def test_text_there_and_back() -> None:
    data = Characters()
    assert data.encode("Aé\n").tolist() == [65, 0xC3, 0xA9, 10]
    assert data.decode(data.encode("Aé\n日本")) == "Aé\n日本"
    assert data.decode(torch.tensor([65, 0xC3])) == "A\N{REPLACEMENT CHARACTER}"


def test_where_a_text_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no file .*input\.txt"):
        Characters(tmp_path).prepare_data()
    (tmp_path / "other.txt").write_bytes(b"some text " * 100)
    data = opened(Characters(tmp_path / "other.txt", length=8, batch_size=2))
    assert data.number("text") == 1000
    monkeypatch.setattr(language, "SHAKESPEARE", (tmp_path / "other.txt").as_uri())
    with pytest.raises(DataError, match="has sha256"):
        Characters().prepare_data()
    monkeypatch.setattr(language, "SHAKESPEARE", (tmp_path / "none.txt").as_uri())
    with pytest.raises(DataError, match=r"cannot fetch .*data\.path"):
        Characters().prepare_data()


# Words


def test_words_are_numbered_by_frequency(tmp_path: Path) -> None:
    lines = {
        "train": ["", " = A = \n", " the cat the \n", " the <unk> dog dog \n"] * 3,
        "validation": ["", " the bird \n"] * 4,
        "test": [" cat dog \n"] * 5,
    }
    folder = write(tmp_path / "words", **{split: {"text": text} for split, text in lines.items()})
    data = opened(Words(folder, vocabulary=6, length=2, batch_size=2))
    words = [word for line in lines["train"] for word in [*line.split(), "<eos>"]]
    counts = Counter(words)
    del counts["<unk>"]
    kept = ["<unk>", *(word for word, _ in counts.most_common(5))]
    assert data.words == kept
    assert kept[1:4] == ["<eos>", "the", "="]
    expected = [
        kept.index(word) if word in kept else 0
        for split in lines
        for line in lines[split]
        for word in [*line.split(), "<eos>"]
    ]
    assert data.tensors["text"]["tokens"].tolist() == expected
    assert data.tensors["text"]["sizes"].tolist() == [len(words), 4 * (1 + 3), 15]
    assert data.decode(data.encode("the dog\nthe bird")) == "the dog \n the <unk>"
    assert data.encode("\n").tolist() == [1]
    # A word that is only in other parts has no number, also where there is room.
    roomy = opened(Words(folder, vocabulary=100, length=2, batch_size=2))
    assert set(roomy.words) == {"<unk>", *words}
    assert roomy.decode(torch.tensor([99])) == "<unk>"


@pytest.mark.parametrize("recipe", ["shakespeare_small", "wikitext103_small"])
def test_generate(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load((train.RECIPES / f"{recipe}.yaml").read_text())
    options = WRITERS[values["task"]](tmp_path / "data", values)
    options = [*TINY, *options, "--data.batch_size", "2"]
    train.run([recipe, *options, "--trainer.max_steps", "1"])
    fails(capsys, 1, ["generate", recipe, *options, "--prompt", ""], "prompt must not be empty")
    train.run(["generate", recipe, *options, "--prompt", "a b", "--length", "5"])
    written = (tmp_path / "runs" / recipe / "samples.txt").read_text()
    assert written.startswith("a b")
    assert len(written) > len("a b\n")
