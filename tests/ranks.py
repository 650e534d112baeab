"""What two processes do together: `python tests/ranks.py RANK FOLDER` plays each scene, writes what failed.

A scene has a process group of its own, and its name and rank a file in the folder: empty, or a traceback.
The truth is the same model trained by one process on the whole batch.
"""

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import oracle
import torch
import torch.distributed as dist
from refusals import refuses
from stacks import build, inputs
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from s4 import S4Block, S4Layer, S4Model, param_groups

WORLD, STEPS, LR = 2, 2, 0.05
CPU = torch.device("cpu")
SCENES: dict[str, Callable[[int, Path], None]] = {}
Optimizers = Callable[[list[dict[str, object]]], torch.optim.Optimizer]


def scene(*arguments: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Under its name and these arguments, which it is called with."""

    def enter(play: Callable[..., None]) -> Callable[..., None]:
        words = [getattr(a, "__name__", str(a)) for a in arguments]
        SCENES[" ".join([play.__name__, *words])] = partial(play, *arguments)
        return play

    return enter


def made(dtype: torch.dtype = torch.float64) -> S4Model:
    torch.manual_seed(0)
    return build("mixed", "final norm").to(dtype)


def batch() -> Tensor:
    """For each step another, of two sequences a rank."""
    torch.manual_seed(1)
    return inputs(2 * WORLD * STEPS).view(STEPS, 2 * WORLD, *inputs(1).shape[1:])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None = None) -> None:
    """Some steps, on the rank's part of the batch or all of it; gradients stay those of the last."""
    for u in batch():
        optimizer.zero_grad()
        mine = u if rank is None else u.chunk(WORLD)[rank]
        model(mine).square().mean().backward()
        optimizer.step()


def sgd(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """Whose step shows how large a gradient is."""
    return torch.optim.SGD(groups, momentum=0.9)


def adam(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, foreach=False)


def grouped(model: nn.Module) -> list[dict[str, object]]:
    return param_groups(model, lr=LR, ssm_lr=LR / 2)


@cache
def alone(optimizers: Optimizers) -> S4Model:
    model = made()
    train(model, optimizers(grouped(model)))
    return model


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def same(model: nn.Module, want: S4Model, tolerance: float = 1e-9, gradients: bool = True) -> None:
    """Parameters, and the gradients that last moved them: the sums of two halves and of all differ by their
    roundings, of some hundred terms, which a gradient of S4 multiplies by its condition, below 1e5."""
    wanted = dict(want.named_parameters())
    for name, p in model.named_parameters():
        w = wanted.pop(
            name.replace("module.", "").replace("_fsdp_wrapped_", "").replace("_checkpoint_wrapped_", "")
        )
        oracle.close(full(p).detach(), w.detach(), tolerance, name)
        if gradients:
            oracle.close(full(p.grad), w.grad, tolerance, f"gradient of {name}")
    assert not wanted


@scene()
def ddp(rank: int, folder: Path) -> None:
    model = DistributedDataParallel(made(), static_graph=True, gradient_as_bucket_view=True)
    train(model, sgd(grouped(model)), rank)
    same(model, alone(sgd))


@scene()
def zero(rank: int, folder: Path) -> None:
    """The optimizer's state is shared out, the groups keep their rates and decays."""
    model = DistributedDataParallel(made())
    optimizer = ZeroRedundancyOptimizer(grouped(model), torch.optim.AdamW, lr=LR, foreach=False)
    train(model, optimizer, rank)
    same(model, alone(adam))
    assert 0 < len(optimizer.optim.state) < len(list(model.parameters()))


def wrapped(
    part: type[nn.Module], original: bool, model: S4Model | None = None, **options: object
) -> nn.Module:
    policy = ModuleWrapPolicy({part})
    return FullyShardedDataParallel(
        made() if model is None else model,
        auto_wrap_policy=policy,
        use_orig_params=original,
        device_id=CPU,
        **options,
    )


@scene(S4Block)
@scene(S4Layer)
def fsdp1(part: type[nn.Module], rank: int, folder: Path) -> None:
    model = wrapped(part, True)
    train(model, sgd(grouped(model)), rank)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        same(model, alone(sgd))


@scene(S4Block)
@scene(S4Layer)
def fsdp1_flat(part: type[nn.Module], rank: int, folder: Path) -> None:
    """Without groups, and torch shows no gradients: the step tells of them."""
    model, plain = wrapped(part, False), made()
    train(plain, torch.optim.SGD(plain.parameters(), lr=LR))
    train(model, torch.optim.SGD(model.parameters(), lr=LR), rank)
    with FullyShardedDataParallel.summon_full_params(model):
        same(model, plain, gradients=False)


@scene()
def fsdp1_groups(rank: int, folder: Path) -> None:
    model = wrapped(S4Block, False)
    refuses(ValueError, "FSDP1 needs use_orig_params=True", lambda: grouped(model))


def longest(p: nn.Parameter) -> Shard:
    """The dimension that all ranks have a part of."""
    return Shard(max(range(p.dim()), key=lambda i: p.shape[i] if p.shape[i] % WORLD == 0 else 0))


def sharded(model: S4Model, which: str, **options: object) -> S4Model:
    mesh = init_device_mesh("cpu", (WORLD,))
    parts: dict[str, list[nn.Module]] = {
        "root": [],
        "blocks": list(model.blocks),
        "layers": [block.layer for block in model.blocks],
    }
    for part in parts[which]:
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@scene("root")
@scene("blocks")
@scene("layers")
def fsdp2(which: str, rank: int, folder: Path) -> None:
    model = sharded(made(), which)
    train(model, sgd(grouped(model)), rank)
    same(model, alone(sgd))


@scene()
def fsdp2_in_equal_parts(rank: int, folder: Path) -> None:
    """C, the largest parameter, is (1, H, N/2, 2): by its first dimension one rank would hold all of it."""
    model = sharded(made(), "blocks", shard_placement_fn=longest)
    C = model.blocks[0].layer.C
    assert 2 * C.to_local().numel() == C.numel()
    train(model, sgd(grouped(model)), rank)
    same(model, alone(sgd))


@scene()
def fsdp2_recomputing(rank: int, folder: Path) -> None:
    model = made()
    apply_activation_checkpointing(model, check_fn=lambda part: isinstance(part, S4Block))
    model = sharded(model, "blocks")
    train(model, sgd(grouped(model)), rank)
    same(model, alone(sgd))


def rounded(keep: str = "-") -> tuple[S4Model, S4Model]:
    """A model, and what one process trains it to with rounded parameters, but for those named `keep`.

    Their gradients by each half of the batch, and the mean of those in float32.
    """
    model, other = made(torch.float32), made(torch.float32)
    optimizer = sgd(grouped(model))
    for u in batch():
        optimizer.zero_grad()
        for mine in u.chunk(WORLD):
            low = {n: p.detach() if keep in n else p.detach().bfloat16() for n, p in model.named_parameters()}
            low = {n: p.requires_grad_() for n, p in low.items()}
            functional_call(model, low, (mine.bfloat16(),)).float().square().mean().backward()
            for name, p in model.named_parameters():
                p.grad = low[name].grad.float() / WORLD + (0 if p.grad is None else p.grad)
        optimizer.step()
    return other, model


def train_rounded(model: nn.Module, want: S4Model, rank: int) -> None:
    optimizer = sgd(grouped(model))
    for u in batch().float():
        optimizer.zero_grad()
        model(u.chunk(WORLD)[rank]).float().square().mean().backward()
        optimizer.step()


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@scene("root")
@scene("blocks")
@scene("layers")
def fsdp2_in_bf16(which: str, rank: int, folder: Path) -> None:
    model, want = rounded()
    model = sharded(model, which, mp_policy=HALF)
    train_rounded(model, want, rank)
    same(model, want, 1e-5)


@scene()
def fsdp2_with_layers_in_float32(rank: int, folder: Path) -> None:
    model, want = rounded("layer.")
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block.layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    fully_shard(model, mesh=mesh, mp_policy=HALF)
    train_rounded(model, want, rank)
    same(model, want, 1e-5)


@scene(S4Block)
@scene(S4Layer)
def fsdp1_in_bf16(part: type[nn.Module], rank: int, folder: Path) -> None:
    model, want = rounded()
    half = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = wrapped(part, True, model, mixed_precision=half)
    train_rounded(model, want, rank)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        same(model, want, 1e-5)


@scene()
def generation_in_bf16(rank: int, folder: Path) -> None:
    plain, model = made(torch.bfloat16).eval(), made(torch.float32)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    model = sharded(model, "blocks", mp_policy=half).eval()
    u = batch()[rank][:, :7].bfloat16()
    closed(model.generate(u, 5, mean), plain.generate(u, 5, mean))


@scene()
def states_are_not_rounded(rank: int, folder: Path) -> None:
    model = sharded(made(torch.float32), "blocks", mp_policy=HALF).eval()
    u = batch()[rank][:, :7].float()
    model(u, return_state=True)
    refuses(TypeError, "state.*float32.*bfloat16", lambda: model.generate(u, 5, mean))


def closed(got: object, want: object) -> None:
    """Outputs and states, in their order."""
    for g, w in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert type(g) is Tensor
        oracle.close(g, w, 1e-9)


def mean(y: Tensor) -> Tensor:
    """What a model of D_OUT outputs takes next."""
    return y[..., : batch().shape[-1]]


@scene("root")
@scene("blocks")
@scene("layers")
def generation(which: str, rank: int, folder: Path) -> None:
    """With nothing registered: what is sharded is gathered by the `forward` that each way passes."""
    plain, model = made().eval(), sharded(made(), which).eval()
    u, lengths = batch()[rank], torch.tensor([7, 3, 1, 5])
    _, state = plain(u, return_state=True)
    # First of all, as a `forward` leaves parameters of the root gathered.
    closed(model.step(u[:, 0], state), plain.step(u[:, 0], state))
    want = plain.generate(u[:, :7], 5, mean, lengths=lengths)
    closed(model.generate(u[:, :7], 5, mean, lengths=lengths), want)
    closed(
        model.step(u[:, 0], model.initial_state(4), rate=2.0),
        plain.step(u[:, 0], plain.initial_state(4), rate=2.0),
    )
    if which != "root":
        x = torch.randn(4, plain.blocks[1].layer.d_model, dtype=torch.float64)
        closed(model.blocks[1].step(x, state.layers[1]), plain.blocks[1].step(x, state.layers[1]))


@scene()
def fsdp1_generation(rank: int, folder: Path) -> None:
    """Of a model wrapped as a whole, with its parameters summoned: a step does not pass what wraps a part."""
    model = FullyShardedDataParallel(made(), use_orig_params=True, device_id=CPU).eval()
    u = batch()[rank][:, :7]
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        closed(model.generate(u, 5, mean), made().eval().generate(u, 5, mean))


@scene()
def from_meta(rank: int, folder: Path) -> None:
    """Made without memory, sharded, then each rank draws its own part; what is not drawn is as ever."""
    with torch.device("meta"):
        model = made()
    model, plain = sharded(model, "blocks").to_empty(device="cpu"), made()
    torch.manual_seed(rank)
    for part in (*model.modules(), *plain.modules()):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for (name, p), (_, w) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        found = full(p.detach())
        if name.endswith(("log_A_real", "A_imag", "P", "B")) or "norm" in name:
            assert torch.equal(found, w), name
        elif name.endswith("log_dt"):
            assert 0.01 <= found.exp().min() < found.exp().max() <= 0.1
        else:
            assert len(found.unique()) == found.numel(), name
    assert model(batch()[0]).isfinite().all()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, where: Path, alone: bool = False) -> None:
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=where, no_dist=alone)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, where: Path, alone: bool = False) -> None:
    weights, state = get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": state}
    checkpoint.load(found, checkpoint_id=where, no_dist=alone)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])


@scene()
def saved(rank: int, folder: Path) -> None:
    """For one process to go on from: see the test."""
    model = sharded(made(), "blocks")
    train(model, optimizer := adam(grouped(model)), rank)
    save(model, optimizer, folder / "checkpoint")


@scene()
def goes_on_in_two(rank: int, folder: Path) -> None:
    """What one process has saved, which had the whole batch."""
    whole, model = made(), sharded(build("mixed", "final norm").double(), "blocks")
    train(whole, its := adam(grouped(whole)))
    save(whole, its, folder / f"of one, {rank}", alone=True)
    load(model, optimizer := adam(grouped(model)), folder / f"of one, {rank}")
    same(model, whole, gradients=False)
    train(model, optimizer, rank)
    train(whole, its)
    same(model, whole)


def main(rank: int, folder: Path) -> None:
    limit = timedelta(seconds=20)
    for name, play in SCENES.items():
        outcome = ""
        store = dist.FileStore(str(folder / f"{name}.store"), WORLD)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
        try:
            play(rank, folder)
        except BaseException:
            outcome = traceback.format_exc()
        dist.destroy_process_group()  # which ends what the other waits for, where this one failed
        (folder / f"{name}.{rank}").write_text(outcome)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
