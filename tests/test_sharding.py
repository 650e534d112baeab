"""Two processes with gloo against one: the scenes of ranks.py, each of which has a test of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from processes import once, process
from torch.distributed import checkpoint
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import ranks
ranks.main(int(sys.argv[1]), Path(sys.argv[2]))
"""
SHARDED = ["root", "blocks", "layers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes wrote: once for all tests here, as to start them takes longer than the scenes."""
    return once(tmp_path_factory, "ranks", play)


def play(folder: Path) -> None:
    tests = str(Path(__file__).parent)
    started = [process(PROGRAM, str(rank), str(folder), tests) for rank in range(ranks.WORLD)]
    for rank, each in enumerate(started):
        _, errors = each.communicate(timeout=300)
        (folder / f"errors.{rank}").write_text(errors)


@pytest.fixture
def passes(folder: Path) -> Callable[[str], None]:
    """Fails with the traceback of the process in which a scene failed."""

    def check(name: str) -> None:
        assert name in ranks.SCENES
        for rank in range(ranks.WORLD):
            file = folder / f"{name}.{rank}"
            if not file.exists():
                pytest.fail(f"not played by rank {rank}: {(folder / f'errors.{rank}').read_text()[-3000:]}")
            if outcome := file.read_text():
                pytest.fail(f"rank {rank}: {outcome}")

    return check


@pytest.mark.promise(
    "sharding and distributed training",
    "`DistributedDataParallel` with `static_graph` and `gradient_as_bucket_view`: one process's gradients",
)
def test_ddp(passes: Callable[[str], None]) -> None:
    passes("ddp")


@pytest.mark.promise(
    "sharding and distributed training", "`ZeroRedundancyOptimizer` over the groups of `param_groups`"
)
def test_zero(passes: Callable[[str], None]) -> None:
    passes("zero")


@pytest.mark.promise(
    "sharding and distributed training",
    "FSDP1 with `use_orig_params=True`, wrapped by `S4Block` or by `S4Layer`, with `param_groups`",
)
@pytest.mark.parametrize("part", ["S4Block", "S4Layer"])
def test_fsdp1(passes: Callable[[str], None], part: str) -> None:
    passes(f"fsdp1 {part}")


@pytest.mark.promise(
    "sharding and distributed training", "FSDP1 with flat parameters, wrapped by `S4Block` or by `S4Layer`"
)
@pytest.mark.parametrize("part", ["S4Block", "S4Layer"])
def test_fsdp1_with_flat_parameters(passes: Callable[[str], None], part: str) -> None:
    passes(f"fsdp1_flat {part}")


@pytest.mark.promise(
    "sharding and distributed training",
    "`param_groups` of the flat parameters of FSDP1: it raises",
    supported=False,
)
def test_flat_parameters_have_no_groups(passes: Callable[[str], None]) -> None:
    passes("fsdp1_groups")


@pytest.mark.promise(
    "sharding and distributed training",
    "FSDP1: `generate` of a model wrapped as a whole, in `summon_full_params`",
)
def test_generation_under_fsdp1(passes: Callable[[str], None]) -> None:
    passes("fsdp1_generation")


@pytest.mark.promise(
    "sharding and distributed training", "FSDP2 (`fully_shard`) of a model, its blocks or its layers"
)
@pytest.mark.parametrize("which", SHARDED)
def test_fsdp2(passes: Callable[[str], None], which: str) -> None:
    passes(f"fsdp2 {which}")


@pytest.mark.promise(
    "sharding and distributed training", "FSDP2 with a `shard_placement_fn`, for parts of one size"
)
def test_fsdp2_in_equal_parts(passes: Callable[[str], None]) -> None:
    passes("fsdp2_in_equal_parts")


@pytest.mark.promise("sharding and distributed training", "FSDP2 with activation checkpointing of each block")
def test_fsdp2_recomputing(passes: Callable[[str], None]) -> None:
    passes("fsdp2_recomputing")


@pytest.mark.promise(
    "sharding and distributed training", "FSDP2: `generate`, `stream` and `step`, with no method registered"
)
@pytest.mark.parametrize("which", SHARDED)
def test_generation_under_fsdp2(passes: Callable[[str], None], which: str) -> None:
    passes(f"generation {which}")


@pytest.mark.promise(
    "sharding and distributed training",
    "a model made on `meta`, sharded by FSDP2, `to_empty`, `reset_parameters`",
)
def test_sharded_from_meta(passes: Callable[[str], None]) -> None:
    passes("from_meta")


@pytest.mark.promise(
    "sharding and distributed training",
    "a `torch.distributed.checkpoint` of two processes, with the optimizer's state, goes on in one",
)
def test_a_checkpoint_of_two_goes_on_in_one(passes: Callable[[str], None], folder: Path) -> None:
    passes("saved")
    model = ranks.made()
    optimizer = ranks.adam(ranks.grouped(model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ranks.load(model, optimizer, folder / "checkpoint", alone=True)
    want = ranks.made()
    other = ranks.adam(ranks.grouped(want))
    ranks.train(want, other)
    ranks.same(model, want, gradients=False)
    for each, its in ((model, optimizer), (want, other)):
        ranks.train(each, its)
    ranks.same(model, want)
    assert {group["name"] for group in optimizer.param_groups} == {"ssm", "no_decay", "decay"}


@pytest.mark.promise(
    "sharding and distributed training",
    "a `torch.distributed.checkpoint` of one process, with the optimizer's state, goes on in two with FSDP2",
)
def test_a_checkpoint_of_one_goes_on_in_two(passes: Callable[[str], None]) -> None:
    passes("goes_on_in_two")


@pytest.mark.promise(
    "sharding and distributed training",
    "a `torch.distributed.checkpoint` of FSDP2 made one file of `torch.save` (`dcp_to_torch_save`), and back",
)
def test_a_checkpoint_of_two_is_made_one_file(
    passes: Callable[[str], None], folder: Path, tmp_path: Path
) -> None:
    passes("saved")
    dcp_to_torch_save(folder / "checkpoint", tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    model, want = ranks.made(), ranks.alone(ranks.adam)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model.load_state_dict(content["model"])
    ranks.same(model, want, gradients=False)
    torch_save_to_dcp(tmp_path / "model.pt", tmp_path / "back")
    back = {"model": ranks.made().state_dict()}
    checkpoint.load(back, checkpoint_id=tmp_path / "back", no_dist=True)
    assert all(torch.equal(back["model"][name], weight) for name, weight in content["model"].items())


@pytest.mark.promise(
    "sharding and distributed training",
    "FSDP2 with a policy of bfloat16 parameters and inputs, for a model, its blocks or its layers",
)
@pytest.mark.parametrize("which", SHARDED)
def test_fsdp2_in_bf16(passes: Callable[[str], None], which: str) -> None:
    passes(f"fsdp2_in_bf16 {which}")


@pytest.mark.promise(
    "sharding and distributed training",
    "FSDP2 with all but the S4 layers in bfloat16, by a policy of their own",
)
def test_fsdp2_with_layers_in_float32(passes: Callable[[str], None]) -> None:
    passes("fsdp2_with_layers_in_float32")


@pytest.mark.promise(
    "sharding and distributed training",
    "FSDP1 with `MixedPrecision` of bfloat16, wrapped by `S4Block` or by `S4Layer`",
)
@pytest.mark.parametrize("part", ["S4Block", "S4Layer"])
def test_fsdp1_in_bf16(passes: Callable[[str], None], part: str) -> None:
    passes(f"fsdp1_in_bf16 {part}")


@pytest.mark.promise(
    "sharding and distributed training",
    "FSDP2: `generate` with a policy of bfloat16 parameters and `cast_forward_inputs=False`",
)
def test_generation_in_bf16(passes: Callable[[str], None]) -> None:
    passes("generation_in_bf16")


@pytest.mark.promise(
    "sharding and distributed training",
    "a state that a policy with `cast_forward_inputs` rounds to bfloat16: it raises",
    supported=False,
)
def test_states_are_not_rounded(passes: Callable[[str], None]) -> None:
    passes("states_are_not_rounded")
