"""A sequence over four processes with gloo, against one process: the scenes of sequence_ranks.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sequence_ranks
import torch
from processes import once, process
from refusals import refuses

from s4.distributed import sequence_parallel

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import sequence_ranks
sequence_ranks.main(Path(sys.argv[1]))
"""
Passes = Callable[[str], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes wrote."""
    return once(tmp_path_factory, "sequence_ranks", play)


def play(folder: Path) -> None:
    _, errors = process(PROGRAM, str(folder), str(Path(__file__).parent)).communicate(timeout=300)
    (folder / "errors").write_text(errors)


@pytest.fixture
def passes(folder: Path) -> Passes:
    """Fails with the traceback of the process in which a scene failed."""

    def check(name: str) -> None:
        assert name in sequence_ranks.SCENES
        for rank in range(sequence_ranks.WORLD):
            file = folder / f"{name}.{rank}"
            if not file.exists():
                pytest.fail(f"not played by rank {rank}: {(folder / 'errors').read_text()[-3000:]}")
            if outcome := file.read_text():
                pytest.fail(f"rank {rank}: {outcome}")

    return check


def names(scene: str) -> list[str]:
    return [name for name in sequence_ranks.SCENES if name.split()[0] == scene]


@pytest.mark.promise(
    "sharding and distributed training",
    "`sequence_parallel`: pieces of a sequence on four ranks, also unequal and empty ones, with `lengths`, "
    "`state` and `return_state`: outputs, states and every gradient of the whole",
)
@pytest.mark.parametrize("scene", names("causal"))
def test_pieces_of_a_causal_layer(passes: Passes, scene: str) -> None:
    passes(scene)


@pytest.mark.promise(
    "sharding and distributed training", "`sequence_parallel`: bidirectional layers, with `lengths`"
)
@pytest.mark.parametrize("scene", names("both"))
def test_pieces_of_a_bidirectional_layer(passes: Passes, scene: str) -> None:
    passes(scene)


@pytest.mark.promise(
    "sharding and distributed training",
    "`sequence_parallel` with `resets`: nothing passes one from rank to rank, be it nan",
)
@pytest.mark.parametrize("scene", [*names("reset"), *names("poison")])
def test_resets_in_pieces(passes: Passes, scene: str) -> None:
    passes(scene)


@pytest.mark.promise(
    "sharding and distributed training",
    "`sequence_parallel`: `S4Model` with each pooling, and its `State`: the whole's on every rank",
)
@pytest.mark.parametrize("scene", names("models"))
def test_models(passes: Passes, scene: str) -> None:
    passes(scene)


@pytest.mark.promise(
    "sharding and distributed training",
    "`sequence_parallel`: batch norm by the statistics of all ranks; tied dropout by one mask a sequence",
)
@pytest.mark.parametrize("scene", ["batch_norm", "tied_dropout", "loose_dropout"])
def test_what_looks_at_the_whole_sequence(passes: Passes, scene: str) -> None:
    passes(scene)


@pytest.mark.promise(
    "sharding and distributed training",
    "`sequence_parallel` with activation checkpointing of both kinds, its backward pass outside the `with`",
)
@pytest.mark.parametrize(
    "scene", [*names("recomputed"), "recomputed_here_or_there", "recomputed_in_evaluation"]
)
def test_activation_checkpointing(passes: Passes, scene: str) -> None:
    passes(scene)


def test_a_layer_twice_in_one_graph(passes: Passes) -> None:
    passes("twice")


@pytest.mark.promise(
    "sharding and distributed training", "`sequence_parallel` in float32, in bfloat16 and under autocast"
)
def test_half_precision(passes: Passes) -> None:
    passes("half")


@pytest.mark.promise(
    "sharding and distributed training",
    "`sequence_parallel` over one dimension of a mesh, `DistributedDataParallel` over the other or over both",
)
def test_two_dimensions(passes: Passes) -> None:
    passes("in_a_mesh")


def test_a_group_of_one(passes: Passes) -> None:
    passes("alone")


@pytest.mark.promise(
    "sharding and distributed training",
    "`step`, `generate`, `PackedSequence`, `torch.func` and second derivatives inside `sequence_parallel`, "
    "ranks with calls of different kinds, shapes, dtypes, lengths or rates: they raise",
    supported=False,
)
def test_what_is_refused(passes: Passes) -> None:
    passes("refused")


def test_needs_processes() -> None:
    assert not torch.distributed.is_initialized()

    def enter() -> None:
        with sequence_parallel(None):
            pass

    refuses(ValueError, "init_process_group", enter)
