"""What the data sets of the examples share, and images: loader, cache, decoding."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

from data import images
from data.base import hold_out
from data.batches import Batch, padded
from data.images import SequentialImages
from data.loader import Loader
from data.storage import DataError
from example_files import write_parquet

pytestmark = pytest.mark.usefixtures("own_folder")


def loader(rank: int = 0, world_size: int = 1, shuffle: bool = True, drop_last: bool = False) -> Loader:
    numbers = torch.arange(103)
    rows = np.arange(3, 103)
    return Loader(
        lambda chosen: Batch(numbers.view(-1, 1, 1)[chosen], numbers[chosen]),
        rows,
        8,
        shuffle=shuffle,
        drop_last=drop_last,
        seed=5,
        rank=rank,
        world_size=world_size,
    )


def labels_of(batches: Loader) -> list[int]:
    return [int(label) for batch in batches for label in batch.targets]


def test_loader_order_depends_on_seed_and_epoch_only() -> None:
    first, again = loader(), loader()
    order = labels_of(first)
    assert sorted(order) == list(range(3, 103))
    assert order != sorted(order)
    assert order == labels_of(again) == labels_of(again)
    again.set_epoch(1)
    assert order != labels_of(again)
    again.set_epoch(0)
    assert order == labels_of(again)
    assert labels_of(loader(shuffle=False)) == list(range(3, 103))


@pytest.mark.parametrize("drop_last", [True, False])
def test_loader_ranks_are_disjoint(drop_last: bool) -> None:
    parts = [loader(rank, 3, drop_last=drop_last) for rank in range(3)]
    orders = [labels_of(part) for part in parts]
    together = sorted(label for order in orders for label in order)
    assert len(together) == len(set(together))
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    if drop_last:
        assert [len(order) for order in orders] == [32, 32, 32]
    else:
        assert together == list(range(3, 103))


@pytest.mark.parametrize("taken", [0, 1, 5, 13])
def test_loader_state_round_trip(taken: int) -> None:
    whole, stopped, resumed = loader(), loader(), loader()
    for batches in (whole, stopped):
        batches.set_epoch(4)
    iterator = iter(stopped)
    seen = [label for _ in range(taken) for label in next(iterator)[1].tolist()]
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(4)
    assert seen + labels_of(resumed) == labels_of(whole)
    # The next pass is a whole one again, also after a pass that was broken off.
    next(iter(resumed))
    assert labels_of(resumed) == labels_of(whole)


def test_loader_state_of_other_data() -> None:
    state = loader().state_dict()
    with pytest.raises(DataError, match="rows_a_step"):
        loader(0, 2).load_state_dict(state)


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.2, 0.3, 0.4])
def test_hold_out_is_stratified_and_fixed(fraction: float) -> None:
    labels = np.random.default_rng(1).integers(0, 10, 2000)
    kept, held = hold_out(labels, fraction)
    assert sorted([*kept, *held]) == list(range(2000))
    assert np.bincount(labels[held]).tolist() == [round(fraction * n) for n in np.bincount(labels)]
    assert all(np.array_equal(a, b) for a, b in zip(hold_out(labels, fraction), (kept, held), strict=True))


def test_digits_splits() -> None:
    data = SequentialImages("digits", batch_size=32)
    data.setup("fit")
    assert data.tensors["train"]["images"].shape == (1438, 64, 1)
    assert data.tensors["train"]["images"].dtype == torch.uint8
    assert len(data.tensors["test"]["labels"]) == 359
    batch = next(iter(data.train_dataloader()))
    assert data.normalize(batch.inputs).shape == (32, 64, 1)
    assert batch.targets.dtype == torch.int64
    pixels = data.normalize(data.tensors["train"]["images"])
    assert abs(pixels.mean()) < 1e-4
    assert abs(pixels.std() - 1) < 1e-3


def test_images_are_decoded_exactly_and_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = SequentialImages("cifar10", path=folders["cifar10"], batch_size=4)
    data.setup("fit")
    expected = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8).reshape(-1, 3)
    assert np.array_equal(data.tensors["train"]["images"][0].numpy(), expected)
    assert data.tensors["train"]["labels"].tolist() == [index % 10 for index in range(60)]

    def build(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(SequentialImages, "build", build)
    SequentialImages("cifar10", path=folders["cifar10"], batch_size=4).setup("fit")


def test_cache_is_rebuilt(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "mnist", images.SOURCES["mnist"])
    data = SequentialImages("mnist", path=folder, batch_size=4, cache_dir=tmp_path / "decoded")
    data.setup("fit")
    whole = data.tensors["train"]["images"].clone()
    for file in (tmp_path / "decoded").iterdir():  # half-written
        file.write_bytes(file.read_bytes()[:1000])
    data.setup("fit")
    assert torch.equal(data.tensors["train"]["images"], whole)
    for content in ({"images": whole}, [1, 2], {**data.tensors["train"], "images": whole[:, :9].clone()}):
        for file in (tmp_path / "decoded").iterdir():  # of another program
            torch.save(content, file)
        data.setup("fit")
        assert torch.equal(data.tensors["train"]["images"], whole)
    os.utime(folder / "train.parquet", (1, 1))  # another file
    data.setup("fit")
    assert len(list((tmp_path / "decoded").iterdir())) == 3


def test_pixel_order_of_permuted_mnist(folders: dict[str, Path]) -> None:
    plain, permuted, again = (
        SequentialImages("mnist", path=folders["mnist"], permute=permute, seed=seed, batch_size=4)
        for permute, seed in ((False, 0), (True, 0), (True, 7))
    )
    assert plain.pixels.tolist() == list(range(784))
    assert sorted(permuted.pixels) == list(range(784))
    assert permuted.pixels[:5].tolist() == [350, 776, 554, 700, 688]
    assert np.array_equal(permuted.pixels, again.pixels)
    for data in (plain, permuted):
        data.setup("fit")
    batch = plain.tensors["train"]["images"][:3]
    assert torch.equal(permuted.normalize(batch), plain.normalize(batch)[:, permuted.pixels])


@pytest.mark.parametrize("shape", [(3, 4097), (3, 2, 4097), (3, 4097, 2)])
def test_ragged_batches_have_few_shapes(shape: tuple[int, ...]) -> None:
    """Tokens, pairs and real numbers, of any length: zeros behind, at most an eighth more."""
    tokens = shape[-1] != 2
    axis = -1 if tokens else 1
    whole, sizes = torch.ones(shape), set()
    for length in [0, 1, 7, 8, 9, *range(2048, 4098)]:
        batch = Batch(whole.narrow(axis, 0, length), torch.zeros(3), torch.tensor([length, 1, 2]))
        inputs = padded(batch, tokens).inputs
        assert torch.equal(inputs.narrow(axis, 0, length), batch.inputs)
        size = inputs.shape[axis]
        assert length <= size <= max(8, length * 9 / 8)
        assert not inputs.narrow(axis, length, size - length).any()
        sizes |= {size} if length >= 2048 else set()
    assert sizes == {*range(2048, 4097, 256), 4608}
