"""What torch has around training, in one process: what it does to a layer, a block and a model.

Meta-device initialisation, activation checkpointing, ensembles, averages, parametrisations, pruning.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from stacks import D_MODEL, D_STATE, L, build, incoming, inputs, same, trained
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import checkpoint

from s4 import S4Block, S4Layer, S4Model, State, param_groups

OPTIONS = {"dplr": {}, "diag": {"variant": "diag"}}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layer(**options: Any) -> S4Layer:
    """Away from its initialisation."""
    made = S4Layer(D_MODEL, D_STATE, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(1 + 0.1 * torch.randn_like(p))
    return made


# meta


@pytest.mark.promise(
    "sharding and distributed training",
    "a model made on `meta`, then `to_empty` and the `reset_parameters` of its parts",
)
@pytest.mark.parametrize("block", ["batch", "rms", "final norm"])
@pytest.mark.parametrize("stack", ["dplr", "mixed"])
def test_made_on_meta(stack: str, block: str) -> None:
    """The numbers of one that was made as ever, with the same seed: nothing is left that is not set."""
    with torch.device("meta"):
        model = build(stack, block)
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device="cpu")
    for t in model.state_dict().values():
        t.fill_(7)  # memory may happen to be what it was
    want = build(stack, block)
    for each in (model, want):
        torch.manual_seed(1)
        for part in each.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    for name, t in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], t), name
    u = inputs(2)
    assert torch.equal(model.eval()(u), want.eval()(u))


@pytest.mark.promise(
    "sharding and distributed training", "a model made on `meta`, then `load_state_dict(assign=True)`"
)
def test_loaded_into_meta() -> None:
    want = trained("mixed", "batch", "mean")
    with torch.device("meta"):
        model = build("mixed", "batch", "mean").eval()
    model.load_state_dict(want.state_dict(), assign=True)
    u, state = inputs(), want.initial_state(3)
    got = model(u, model.initial_state(3), return_state=True)
    assert torch.equal(got[0], want(u, state, return_state=True)[0])
    with torch.no_grad():
        oracle.close(model.step(u[:, 0], model.initial_state(3))[0], want.step(u[:, 0], state)[0], 0)


# activation checkpointing


def parts(kind: str) -> tuple[nn.Module, Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """A module, a call of it with a state and lengths whose outputs are flat, and what it is called with."""
    lengths = torch.tensor([L, 3, 11])
    if kind == "model":
        model = build("mixed", "final norm", "mean")
        state = incoming(model)

        def call(u: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            y, after = model(u, State(given[:2], given[2], state.length), lengths=lengths, return_state=True)
            return (y, *after.layers, after.total)

        return model, call, [inputs(), *state.layers, state.total]
    module = layer() if kind == "layer" else S4Block(layer(variant="diag"), d_ff=5)
    call = partial(module, lengths=lengths, return_state=True)
    return module, call, [draw(3, L, D_MODEL), draw(3, D_MODEL, D_STATE)]


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum((y * torch.linspace(-1, 2, y.numel()).double().view_as(y)).sum() for y in outputs)
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.promise(
    "sharding and distributed training",
    "`torch.utils.checkpoint` through layer, block and model, with states and lengths, reentrant and not",
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("kind", ["layer", "block", "model"])
def test_recomputed(kind: str, reentrant: bool, training: bool) -> None:
    """In eval what parameters come to is kept where nothing is recorded, as in the first pass of one kind."""
    module, call, leaves = parts(kind)
    module.train(training)
    leaves = [t.detach().requires_grad_() for t in leaves]
    with torch.no_grad():
        call(*leaves)
    got = checkpoint.checkpoint(call, *leaves, use_reentrant=reentrant)
    want = call(*leaves)
    for g, w in zip(got, want, strict=True):
        oracle.close(g, w, 1e-9)
    leaves += list(module.parameters())
    if reentrant:  # which takes no list of what to differentiate by
        loss = sum((y * torch.linspace(-1, 2, y.numel()).double().view_as(y)).sum() for y in got)
        loss.backward()
        found = [leaf.grad for leaf in leaves]
    else:
        found = gradients(got, leaves)
    for g, w in zip(found, gradients(want, leaves), strict=True):
        oracle.close(g, w, 1e-9)


@pytest.mark.promise(
    "sharding and distributed training", "selective checkpointing, and activations offloaded by `save_on_cpu`"
)
@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize("how", ["selective", "offloaded"])
def test_recomputed_in_part(how: str, mode: str) -> None:
    model = build("mixed", "final norm")
    for block in model.blocks:
        block.layer.mode = mode
    u = inputs().requires_grad_()
    leaves = [u, *model.parameters()]
    wanted = gradients((model(u),), leaves)
    if how == "offloaded":
        with torch.autograd.graph.save_on_cpu():
            y = model(u)
    else:
        kept = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default]
        context = partial(checkpoint.create_selective_checkpoint_contexts, kept)
        y = checkpoint.checkpoint(model, u, use_reentrant=False, context_fn=context)
    for g, w in zip(gradients((y,), leaves), wanted, strict=True):
        oracle.close(g, w, 1e-9)


# torch.func


@pytest.mark.promise(
    "torch.func and forward mode",
    "an ensemble of models under `vmap`: outputs, states, gradients, with lengths, of their own or shared",
)
@pytest.mark.parametrize("own", [True, False], ids=["own inputs", "same inputs"])
@pytest.mark.parametrize(("stack", "block"), [("dplr", "prenorm"), ("diag", "postnorm"), ("mixed", "batch")])
def test_an_ensemble(stack: str, block: str, own: bool) -> None:
    models = [trained(stack, block, "none") for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    u = torch.stack([inputs(2) for _ in models]) if own else inputs(2)
    lengths = torch.tensor([[L, 4], [1, 2], [7, L]]) if own else torch.tensor([L, 4])
    dims = (0, 0, 0, 0) if own else (0, 0, None, None)

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], u: Tensor, n: Tensor) -> tuple[Tensor, Any]:
        y, state = functional_call(base, (p, b), (u,), {"lengths": n, "return_state": True})
        return y.square().sum() + sum(x.square().sum() for x in state.layers), (y, tuple(state))

    grads, (y, state) = torch.vmap(torch.func.grad(loss, has_aux=True), in_dims=dims)(
        parameters, buffers, u, lengths
    )
    for i, model in enumerate(models):
        want, after = model(u[i] if own else u, lengths=lengths[i] if own else lengths, return_state=True)
        oracle.close(y[i], want, 1e-9)
        same(State(tuple(x[i] for x in state[0]), state[1][i], state[2][i]), after)
        total = want.square().sum() + sum(x.square().sum() for x in after.layers)
        names = list(parameters)
        for name, w in zip(names, torch.autograd.grad(total, list(model.parameters())), strict=True):
            oracle.close(grads[name][i], w, 1e-8, name)


@pytest.mark.promise(
    "torch.func and forward mode", "`vmap` over inputs, states and lengths, along any dimension"
)
@pytest.mark.parametrize("mode", ["fft", "scan", "auto"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_mapped_over_inputs(options: dict[str, Any], mode: str) -> None:
    its = layer(mode=mode, **options)
    u, x = draw(2, L, 3, D_MODEL), draw(2, D_MODEL, D_STATE, 3)
    lengths = torch.tensor([[L, 5], [3, 1], [0, L]])
    call = partial(its, return_state=True)
    for given, dims in ((lengths, 0), (lengths[0], None)):
        y, after = torch.vmap(lambda u, x, n: call(u, x, lengths=n), in_dims=(2, 3, dims), out_dims=(2, 0))(
            u, x, given
        )
        for i in range(3):
            want, last = call(u[:, :, i], x[..., i], lengths=given[i] if dims == 0 else given)
            oracle.close(y[:, :, i], want, 1e-9)
            oracle.close(after[i], last, 1e-9)


@pytest.mark.promise("torch.func and forward mode", "an ensemble's dropout, with `randomness='different'`")
def test_an_ensemble_in_training() -> None:
    models = [build("mixed", "rms") for _ in range(2)]
    parameters, buffers = stack_module_state(models)
    base, u = copy.deepcopy(models[0]).to("meta").train(), inputs(2)
    run = lambda p, b: functional_call(base, (p, b), (u,))  # noqa: E731
    same_twice = {name: p[:1].expand_as(p) for name, p in parameters.items()}
    y = torch.vmap(run, randomness="different")(same_twice, buffers)
    assert not torch.allclose(y[0], y[1])
    y = torch.vmap(run, randomness="same")(same_twice, buffers)
    oracle.close(y[0], y[1], 1e-9)


# averages, parametrisations, pruning, swapped tensors


def stepped(model: S4Model, u: Tensor) -> Tensor:
    """As one generates: in eval, without gradients, what parameters come to is kept between calls."""
    state, outputs = model.initial_state(len(u)), []
    with torch.no_grad():
        for t in range(3):
            y, state = model.step(u[:, t], state)
            outputs.append(y)
    return torch.stack(outputs, 1)


@pytest.mark.promise(
    "other libraries", "`AveragedModel`, of the mean and exponential: what it computes follows every update"
)
@pytest.mark.parametrize("exponential", [True, False])
def test_averaged(exponential: bool) -> None:
    model, u = build("mixed", "final norm"), inputs()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if exponential else None).eval()
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
    want: dict[str, Tensor] = {}
    for i in range(3):
        model(u).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        weight = 1.0 if i == 0 else 0.5 if exponential else 1 / (i + 1)
        for name, p in model.named_parameters():
            want[name] = (1 - weight) * want.get(name, 0) + weight * p.detach()
        plain = copy.deepcopy(model).eval()
        plain.load_state_dict(want)
        with torch.no_grad():
            oracle.close(average(u), plain(u), 1e-9)
        oracle.close(stepped(average.module, u), stepped(plain, u), 1e-9)


class Positive(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return nn.functional.softplus(t)


@pytest.mark.promise(
    "other libraries", "`torch.nn.utils.parametrize` of any parameter: gradients reach the original"
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parametrized(options: dict[str, Any]) -> None:
    plain = layer(**options)
    its = copy.deepcopy(plain)
    u = draw(2, L, D_MODEL)
    for name in dict(plain.named_parameters()):
        if name == "C":
            parametrizations.weight_norm(its, "C", dim=1)  # one size a channel
        else:
            parametrize.register_parametrization(its, name, Positive())
    originals = dict(its.named_parameters())

    def made(values: dict[str, Tensor]) -> dict[str, Tensor]:
        positive = {
            n.split(".")[1]: nn.functional.softplus(t) for n, t in values.items() if n.endswith("original")
        }
        g, v = values["parametrizations.C.original0"], values["parametrizations.C.original1"]
        return {**positive, "C": g * v / torch.linalg.vector_norm(v, dim=(0, 2, 3), keepdim=True)}

    def loss(y: Tensor, x: Tensor) -> Tensor:
        return y.square().sum() + x.square().sum()

    y, x = its(u, return_state=True)
    want = functional_call(plain, made(originals), (u,), {"return_state": True})
    wanted = torch.autograd.grad(loss(*want), list(originals.values()))
    for got, w in zip(torch.autograd.grad(loss(y, x), list(originals.values())), wanted, strict=True):
        oracle.close(got, w, 1e-9)
    its.eval()
    with torch.no_grad():
        for name in ("parametrizations.log_dt.original", "parametrizations.C.original0"):
            its.step(u[:, 0], x)
            originals[name].mul_(0.9)  # is seen in the next step
            got = its.step(u[:, 0], x)
            y, after = functional_call(plain, made(originals), (u[:, :1], x), {"return_state": True})
            oracle.close(got[0], y[:, 0], 1e-9)
            oracle.close(got[1], after, 1e-9)


@pytest.mark.promise(
    "other libraries", "`torch.nn.utils.prune`: a step, too, takes the masked parameter as it is now"
)
def test_pruned() -> None:
    its, u, x = layer().eval(), draw(3, D_MODEL), draw(3, D_MODEL, D_STATE)
    prune.random_unstructured(its, "C", 0.5)
    with torch.no_grad():
        its.step(u, x)
        its.C_orig.mul_(2)
        plain = copy.deepcopy(its)
        prune.remove(plain, "C")
        plain.C.copy_(its.C_orig * its.C_mask)
        for got, want in zip(its.step(u, x), plain.step(u, x), strict=True):
            oracle.close(got, want, 1e-9)


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.promise(
    "other libraries",
    "`torch.__future__.set_swap_module_params_on_conversion`: an optimizer's parameters stay",
)
@pytest.mark.usefixtures("swapping")
def test_swapped() -> None:
    model, u = build("mixed", "final norm").float().eval(), inputs()
    first = dict(model.named_parameters())
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
    stepped(model, u.float())
    model.double()
    assert all(p is first[name] and p.dtype == torch.float64 for name, p in model.named_parameters())
    other = trained("mixed", "final norm", "none")
    stepped(model, u)
    model.load_state_dict(other.state_dict())
    oracle.close(stepped(model, u), stepped(other, u), 1e-9)
    model(u).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(stepped(model, u), stepped(other, u))
