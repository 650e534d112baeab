"""What torch sees of the recurrence with a step of time for each input: operators, graphs, memory."""

from functools import partial
from typing import Any

import pytest
import torch
from oracle import close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import s4.kernel
from s4 import S4Layer
from s4.ops import varying as ops
from s4.ops.varying import varying
from s4.system import readout, stack, system

FUSED = not isinstance(s4.kernel.backends()["cpu"], str)
fused = pytest.mark.skipif(not FUSED, reason="the C++ extension is not built")
B, L, H, N = 2, 5, 2, 4
KINDS: dict[str, dict[str, Any]] = {
    "dplr": {"variant": "dplr"},
    "zoh": {"variant": "diag"},
    "both ways": {"variant": "diag", "bidirectional": True},
}


def made(kind: str, L: int = L) -> tuple[S4Layer, Tensor, Tensor, Tensor, Tensor]:
    """A layer, inputs, rates, a state and resets."""
    layer = S4Layer(H, N, dtype=torch.float64, dt_min=0.1, dt_max=0.5, **KINDS[kind])
    u, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((B, L, H), (B, H, N)))
    rate = torch.rand(B, L, dtype=torch.float64) + 0.5
    resets = torch.zeros(B, L, dtype=torch.bool)
    resets[0, L // 2] = True
    return layer, u, rate, x, resets


def operands(kind: str) -> list[Any]:
    """Of the operator, with positions and a gradient for all numbers."""
    layer, u, rate, x, resets = made(kind)
    Lambda, P, B_, C, dt, name = system(*layer._systems(1.0))
    numbers = (u, rate, x, stack(Lambda), stack(P), stack(B_), readout(C)[0], layer.D, dt)
    read = [t.detach().clone().requires_grad_() for t in numbers]
    return [*read, resets, torch.tensor([[3, -1, 3], [0, 2, -1]]), name]


@pytest.mark.parametrize("kind", ["dplr", "zoh"])
def test_they_are_sound_operators(kind: str) -> None:
    *numbers, resets, positions, name = operands(kind)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.operator, (*numbers, resets, positions, name, "auto"), test_utils=tests)
    y, states = ops.operator(*numbers, None, positions, name, "auto")
    values = [t.detach() for t in numbers]
    sent = [y.detach() + 1, states.detach() + 1]
    tests = tests if FUSED else tests[1:]  # the first cannot look into torch.func
    torch.library.opcheck(
        ops.operator_backward, (sent, values, None, positions, name, "auto"), test_utils=tests
    )


@pytest.mark.parametrize("kind", ["dplr", "zoh"])
def test_derivatives_of_derivatives(kind: str) -> None:
    """By finite differences, with states that are wanted twice and a reset."""
    *numbers, resets, positions, name = operands(kind)

    def run(*t: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = ops.operator(*t, resets, positions, name, "auto")
        return found

    assert torch.autograd.gradcheck(run, numbers, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, numbers, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_pass_through(kind: str) -> None:
    """Forward mode, vmap over batches and gradients, and the Hessian, as one by one."""
    layer, u, rate, x, resets = made(kind)
    systems = system(*layer._systems(1.0))._replace()
    systems = systems._replace(**{k: getattr(systems, k).detach() for k in ("Lambda", "P", "B", "C", "dt")})
    D = layer.D.detach()
    before = None if kind == "both ways" else x

    def run(u: Tensor, rate: Tensor) -> Tensor:
        y, _ = varying(systems, D, u, rate, before, resets)
        return y

    v = torch.randn_like(u), torch.randn_like(rate)
    y, moved = torch.func.jvp(run, (u, rate), v)
    close(y, run(u, rate), 1e-12)
    step = 1e-5
    near = run(u + step * v[0], rate + step * v[1]) - run(u - step * v[0], rate - step * v[1])
    close(moved, near / (2 * step), 1e-7)
    several = torch.stack([u, 2 * u, u - 1])
    close(
        torch.vmap(run, (0, None))(several, rate), torch.stack([run(each, rate) for each in several]), 1e-12
    )
    rate.requires_grad_()
    y = run(u, rate)
    sent = torch.randn(3, *y.shape, dtype=y.dtype)
    (batched,) = torch.autograd.grad(y, [rate], sent, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, [rate], g, retain_graph=True)[0] for g in sent]
    close(batched, torch.stack(single), 1e-12)


@pytest.mark.parametrize("kind", ["dplr", "both ways"])
@pytest.mark.usefixtures("unchecked")
def test_one_graph_serves_all_lengths(kind: str) -> None:
    """In full, complex numbers on neither side of an operator; gradients as without."""
    layer, *_ = made(kind)
    graphs: list[torch.fx.GraphModule] = []

    def collect(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph

    def run(u: Tensor, rate: Tensor, resets: Tensor) -> Tensor:
        y, _ = varying(system(*layer._systems(1.0)), layer.D, u, rate, None, resets)
        return y

    compiled = torch.compile(run, backend=collect, fullgraph=True, dynamic=True)
    for length in (9, 17, 30):
        _, u, rate, _, resets = made(kind, length)
        rate.requires_grad_()
        got, want = compiled(u, rate, resets), run(u, rate, resets)
        assert torch.equal(got, want)
        g = torch.randn_like(want)
        leaves = [rate, *layer.parameters()]
        for a, b in zip(*(torch.autograd.grad(y, leaves, g) for y in (got, want)), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 1
    called = [node for node in graphs[0].graph.nodes if "varying" in str(node.target)]
    assert len(called) == 1 + (kind == "both ways")
    for node in called:
        held = [n.meta["example_value"] for n in node.all_input_nodes if "example_value" in n.meta]
        assert not any(isinstance(t, Tensor) and t.is_complex() for t in held)


def test_no_states_are_kept() -> None:
    """For the gradient inputs alone are: some 2 numbers an input, where states would be N."""
    length, size = 700, 64
    layer = S4Layer(H, size)
    u, rate = torch.randn(B, length, H, requires_grad=True), torch.rand(B, length) + 0.5
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        varying(system(*layer._systems(1.0)), layer.D, u, rate)
    assert sum(kept.values()) < 3 * (u.nbytes + 2 * rate.nbytes) + 64 * H * size * 8


def test_the_plain_definition_holds_the_states_of_a_chunk() -> None:
    """Chunks of sqrt(L): in the backward pass no tensor has the states of all steps."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, Tensor):
                    self.size = max(self.size, t.untyped_storage().nbytes())
            return out

    *numbers, resets, positions, name = operands("zoh")
    length = 1100
    numbers = [t.detach() for t in numbers]
    numbers[0], numbers[1] = numbers[0][:, :1].repeat(1, length, 1), numbers[1][:, :1].repeat(1, length)
    sent = [torch.ones_like(numbers[0]), torch.zeros(B, 3, H, N, dtype=torch.float64)]
    with Largest() as largest:
        ops.plain_backward(sent, numbers, resets[:, :1].expand(B, length), positions, name)
    assert largest.size <= B * 64 * H * N * 8 + 2 * numbers[0].nbytes


@pytest.mark.parametrize("name", ["dplr", "diag"])
def test_a_device_without_float64(name: str, mps: Any) -> None:
    """All is computed on the CPU, and comes back with its gradients: as there."""
    found: list[tuple[Tensor, ...]] = []
    given = torch.randn(B, L, H), torch.rand(B, L) + 0.5, torch.randn(B, H, N)
    sent = torch.randn(B, L, H)
    layer = S4Layer(H, N, variant=name)
    for device in ("cpu", "mps"):
        layer = layer.to(device)
        u, rate, x = (t.to(device).requires_grad_() for t in given)
        resets, positions = made(name if name == "dplr" else "zoh")[4], torch.tensor([[3], [-1]])
        y, states = varying(
            system(*layer._systems(1.0)), layer.D, u, rate, x, resets.to(device), positions.to(device)
        )
        assert states is not None
        assert (y.device.type, states.device.type) == (device, device)
        wanted = [u, rate, x, *layer.parameters()]
        grads = torch.autograd.grad(y, wanted, sent.to(device))
        found.append(tuple(t.cpu() for t in (y.detach(), states.detach(), *grads)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@fused
def test_flops_are_counted() -> None:
    """Of the recurrence, and three times as many or so for its gradient."""
    layer, u, rate, *_ = made("dplr")
    with FlopCounterMode(display=False) as counter:
        varying(system(*layer._systems(1.0)), layer.D, u, rate)[0].sum().backward()
    counts = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    assert counts["s4.varying"] == B * L * H * (N // 2 * (29 + 20) + 2)
    assert 2 * counts["s4.varying"] < counts["s4.varying_backward"] < 4 * counts["s4.varying"]


def test_wrong_operands_raise() -> None:
    *numbers, resets, positions, name = operands("dplr")
    run = partial(ops.operator, discretization=name, backend="torch")
    assert run(*numbers, resets, positions)[1].shape == (B, 3, H, N)
    for i in range(9):
        wrong = [t[..., :1] if j == i else t for j, t in enumerate(numbers)]
        with pytest.raises(ValueError, match="need operands of shapes"):
            run(*wrong, resets, positions)
    for where in ((resets[:, 1:], positions), (resets.int(), positions), (resets, positions.int())):
        with pytest.raises(ValueError, match="need operands of shapes"):
            run(*numbers, *where)
    with pytest.raises(ValueError, match="need operands of shapes"):
        run(numbers[0].float(), *numbers[1:], resets, positions)
    values = [t.detach() for t in numbers]
    y, states = run(*values, resets, positions)
    for sent in ([y[:, 1:], states], [y, states.float()]):
        with pytest.raises(ValueError, match="need gradients"):
            ops.operator_backward(sent, values, resets, positions, name, "torch")
