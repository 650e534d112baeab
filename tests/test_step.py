"""S4Layer.step: fused code and plain code against dense loops."""

import copy
import gc

import pytest
import torch
from oracle import close
from step_cases import FUSED, SYSTEMS, H, N, build, check, fused, operands, truth
from test_process import run
from torch import Tensor, nn

from s4 import S4Layer
from s4.backends import cpu
from s4.ops import kept
from s4.ops import step as op
from s4.system import discretize, system

LEVELS = ["v4", "v3", "base"][["v4", "v3", "base"].index(cpu.level()) :] if FUSED else []


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instruction set in the library that this processor has."""
    monkeypatch.setattr(cpu, "level", lambda: request.param)


@fused
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("h", [1, 5])
@pytest.mark.parametrize("n", [2, 8, 10, 12, 16, 24, 64, 66])
@pytest.mark.parametrize(("variant", "init"), SYSTEMS)
@pytest.mark.usefixtures("still", "level")
def test_fused_step_is_the_dense_one(variant: str, init: str, n: int, h: int, dtype: torch.dtype) -> None:
    layer = build(variant, init, h, n, dtype=dtype)
    for batch in (0, 1, 3, 17):
        u, x = operands(layer, batch)
        for rate in (1.0, 0.5):
            y, moved = layer.step(u, x, rate=rate)
            want, want_moved = truth(layer, u, x, rate)
            assert (y.dtype, moved.dtype) == (dtype, dtype)
            assert (y.shape, moved.shape) == (u.shape, x.shape)
            if batch:
                close(y, want, 1e-12 if dtype == torch.float64 else 1e-4)  # a sum that may cancel
                close(moved, want_moved, 1e-12 if dtype == torch.float64 else 1e-5)


@fused
@pytest.mark.usefixtures("still", "level")
def test_fused_step_on_threads() -> None:
    """Enough work for several tasks."""
    layer = build(h=67, n=64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(layer, *operands(layer, 41))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("still", "either")
def test_operands_may_lie_in_any_way() -> None:
    layer = build()
    u, x = torch.randn(H, 8).double().T[::2], torch.randn(N, H, 4).double().permute(2, 1, 0)
    assert not u.is_contiguous()
    check(layer, u, x)
    check(layer, torch._neg_view(u.contiguous()), torch._neg_view(x.contiguous()))
    check(layer, u[:1].expand(4, H), x[:1].expand(4, H, N))
    check(layer, u, x.clone(memory_format=torch.contiguous_format).mT.contiguous().mT)


@pytest.mark.parametrize("name", ["D", "log_dt", "log_A_real", "A_imag", "B", "C", "P"])
@pytest.mark.usefixtures("still", "either")
def test_parameters_may_lie_in_any_way(name: str) -> None:
    """Strided, or one number expanded, which must not be read as an array."""
    layer = build(n_ssm=H)
    u, x = operands(layer)
    value = getattr(layer, name).detach()
    setattr(layer, name, nn.Parameter(torch.stack([value, value + 1], -1)[..., 0]))
    check(layer, u, x)
    setattr(layer, name, nn.Parameter(value.flatten()[:1].expand(value.shape)))
    check(layer, u, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.usefixtures("still", "either")
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    layer = build(dtype=torch.float32)
    u, x = operands(layer)
    y, moved = layer.step(u.to(dtype), x)
    want, want_moved = layer.step(u.to(dtype).float(), x)
    assert y.dtype == dtype
    assert torch.equal(y, want.to(dtype))
    assert torch.equal(moved, want_moved)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(build_like(layer).step(u.to(dtype), x)[1], want_moved)


def build_like(layer: S4Layer) -> S4Layer:
    """The same numbers, nothing kept."""
    return copy.deepcopy(layer)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("still", "level", "unchecked")
def test_silence_leaves_no_denormal_numbers_and_nan_stays(dtype: torch.dtype) -> None:
    layer = build(dtype=dtype)
    u, x = operands(layer)
    tiny = torch.finfo(dtype).tiny
    _, moved = layer.step(u * 0, x * tiny)
    assert ((moved == 0) | (moved.abs() >= tiny)).all()
    _, moved = layer.step(u * 0, x * tiny / 1024)
    assert (moved == 0).all()
    assert (torch.full((99,), tiny, dtype=dtype) / 4 > 0).all()  # torch still has its own
    x[0, 1, 2] = torch.nan
    assert layer.step(u, x)[1][0, 1].isnan().any()
    assert layer.step(u * torch.nan, x)[1].isnan().all()


@fused
def test_the_operator_is_sound_and_checks() -> None:
    layer = build("dplr", "legt", dtype=torch.float32)
    u, x = operands(layer)
    arguments = [
        t.detach() for t in (*discretize(system(*layer._systems(1.0))).to(layer.D.dtype), layer.D, x, u)
    ]
    torch.library.opcheck(op.step, (*arguments, "auto"))
    for i, wrong in enumerate(arguments):
        for bad in (wrong[..., :-1], wrong.double()):
            with pytest.raises((ValueError, RuntimeError)):
                op.step(*arguments[:i], bad, *arguments[i + 1 :], "auto")


@fused
@pytest.mark.parametrize(("variant", "init"), SYSTEMS)
@pytest.mark.usefixtures("still")
def test_the_operator_that_keeps_is_sound(variant: str, init: str) -> None:
    """And keeps nothing of layers that are no more."""
    layer = build(variant, init)
    u, x = operands(layer)
    method = layer.discretization
    values = [None if p is None else p.detach() for p in layer._systems(1.0)[:6]]
    torch.library.opcheck(op.step_kept, (values, layer.D.detach(), x, u, 0.5, method, "auto"))
    del values
    gc.collect()
    before = len(kept._kept)
    layers = [build(variant, init) for _ in range(4)]
    for layer in layers * 2:
        got = op.step_kept(layer._systems(1.0)[:6], layer.D, x, u, 1.0, method, "auto")
        for g, w in zip(got, truth(layer, u, x), strict=True):
            close(g, w, 1e-12)
    assert len(kept._kept) == before + 4
    layer.C.mul_(2)
    got = op.step_kept(layer._systems(1.0)[:6], layer.D, x, u, 1.0, method, "auto")
    close(got[0], truth(layer, u, x)[0], 1e-12)
    del layers, layer
    gc.collect()
    assert len(kept._kept) == before


class Step(nn.Module):
    def __init__(self, layer: S4Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.step(u, x)


@pytest.mark.promise("torch.func and forward mode", "a kept `step` under `functional_call`, `vmap` and `jvp`")
@pytest.mark.usefixtures("still", "either")
def test_transforms() -> None:
    """functional_call, vmap over inputs and over layers, and forward-mode derivatives, after a kept step."""
    layer, other = build(), build()
    module = Step(layer)
    u, x = operands(layer)
    module(u, x)
    values = {name: p.detach().clone() for name, p in Step(other).named_parameters()}
    want = truth(other, u, x)
    close(torch.func.functional_call(module, values, (u, x))[0], want[0], 1e-12)
    for name in values:  # one of them alone
        changed = build_like(layer)
        setattr(changed, name.split(".")[1], nn.Parameter(values[name]))
        got = torch.func.functional_call(module, {name: values[name]}, (u, x))[0]
        close(got, truth(changed, u, x)[0], 1e-12)
    each = torch.func.vmap(lambda u, x: layer.step(u[None], x[None])[0][0])(u, x)
    close(each, truth(layer, u, x)[0], 1e-12)
    stacked = {name: torch.stack([p, values[name]]) for name, p in module.named_parameters()}
    both = torch.func.vmap(lambda v: torch.func.functional_call(module, v, (u, x))[0])(stacked)
    close(both, torch.stack([truth(layer, u, x)[0], want[0]]), 1e-12)
    tangent = torch.randn_like(x)
    _, along = torch.func.jvp(lambda x: layer.step(u, x)[0], (x,), (tangent,))
    close(along, truth(layer, u * 0, tangent)[0], 1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        along = torch.autograd.forward_ad.unpack_dual(layer.step(u, dual)[0]).tangent
        close(along, truth(layer, u * 0, tangent)[0], 1e-12)


@pytest.mark.usefixtures("still", "either")
def test_without_numbers() -> None:
    for device in ("meta", "fake"):
        mode = torch._subclasses.FakeTensorMode()
        with mode if device == "fake" else torch.device("meta"):
            layer = build(dtype=torch.float32)
            u, x = operands(layer)
            y, moved = layer.step(u, x)
        assert (y.shape, moved.shape) == (u.shape, x.shape)
        assert type(y) is type(u)


@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize(("variant", "init"), SYSTEMS)
@pytest.mark.usefixtures("still", "either", "unchecked")
def test_steps_are_forward(variant: str, init: str, mode: str) -> None:
    layer = build(variant, init, mode=mode)
    u, x = torch.randn(2, 300, H).double(), operands(layer)[1]
    want, last = layer(u, x, return_state=True)
    outputs = []
    for u_t in u.unbind(1):
        y, x = layer.step(u_t, x)
        outputs.append(y)
    close(torch.stack(outputs, 1), want, 1e-9)
    close(x, last, 1e-9)


COMPILE = """
import torch
from torch._dynamo.utils import counters
from s4 import S4Layer
from s4.ops import step as op
torch.manual_seed(0)
made, make = [], op._rounded
op._rounded = lambda *systems: made.append(None) or make(*systems)
for variant in ("dplr", "diag"):
    for training in (False, True):
        torch.compiler.reset()
        made.clear()
        counters.clear()
        layer = S4Layer(4, 10, variant=variant).train(training)
        step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
        x = want_x = layer.initial_state(2)
        with torch.set_grad_enabled(training):
            for t in range(30):
                u = torch.randn(2, 4)
                y, x = step(u, x)
                want, want_x = layer.step(u, want_x)
                torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
                if t == 10:
                    with torch.no_grad():
                        layer.C.mul_(2), layer.log_dt.data.add_(0.1)
                if training:
                    y.sum().backward()
                    x, want_x = x.detach(), want_x.detach()
        print(counters["stats"]["unique_graphs"], len(made))
    layer.eval()
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
        def forward(self, u, x):
            return self.layer.step(u, x)
    with torch.no_grad():
        program = torch.export.export(Step(), (u, x))
        torch.testing.assert_close(program.module()(u, x), layer.step(u, x), rtol=1e-4, atol=1e-5)
"""


def test_one_graph_serves_all_steps() -> None:
    """In eval it discretises at first and after a change, as eager steps do; in training the graph does."""
    assert run(COMPILE).split() == ["1", "4" if FUSED else "2", "1", "0"] * 2


@pytest.mark.usefixtures("still", "unchecked")
@pytest.mark.parametrize(("name", "shape"), [("D", (1,)), ("C", (1, 2, 5, 2)), ("log_dt", (2,))])
def test_parameters_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    """What C++ would read beyond its end is refused."""
    layer = S4Layer(4, 10).eval()
    setattr(layer, name, nn.Parameter(torch.randn(shape)))
    u = torch.randn(3, layer.D.shape[0])
    with pytest.raises((ValueError, RuntimeError)):
        layer.step(u, torch.zeros(3, 4, 10))


@pytest.mark.usefixtures("still")
def test_a_higher_rank_than_the_fused_code_has() -> None:
    layer = S4Layer(4, 10, dtype=torch.float64).eval()
    layer.P = nn.Parameter(0.3 * torch.randn(3, 1, 5, 2, dtype=torch.float64))
    A, B, C, D = layer.dense()
    u, x = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, 10, dtype=torch.float64)
    moved = torch.einsum("hnm,bhm->bhn", A, x) + B * u[..., None]
    y, got = layer.step(u, x)
    close(got, moved, 1e-12)
    close(y, torch.einsum("hn,bhn->bh", C, moved) + D * u, 1e-12)
