"""S4Layer.step: fused code against dense loops, and parameters kept in eval that are never out of date."""

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracle import close
from test_process import run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import s4.kernel
from s4 import S4Layer
from s4.backends import cpu
from s4.ops import kept
from s4.ops import step as op
from s4.ops.kept import Kept
from s4.system import Recurrence, discretize, system

FUSED = not isinstance(s4.kernel.backends()["cpu"], str)
LEVELS = ["v4", "v3", "base"][["v4", "v3", "base"].index(cpu.level()) :] if FUSED else []
fused = pytest.mark.skipif(not FUSED, reason="the C++ extension is not built")
SYSTEMS = [("dplr", "legs"), ("dplr", "legt"), ("diag", "lin")]
H, N = 3, 10  # five modes: not a whole number of vectors


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instruction set in the library that this processor has."""
    monkeypatch.setattr(cpu, "level", lambda: request.param)


@pytest.fixture(params=[pytest.param("fused", marks=fused), "plain"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library, and as where it could not be built."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "_library", lambda: "not built")


@pytest.fixture
def still() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(variant: str = "dplr", init: str = "legs", h: int = H, n: int = N, **options: object) -> S4Layer:
    layer = S4Layer(h, n, variant=variant, init=init, **{"dtype": torch.float64, **options})  # type: ignore[arg-type]
    return layer.eval()


def operands(layer: S4Layer, batch: int = 2) -> tuple[Tensor, Tensor]:
    u = torch.randn(batch, layer.d_model, dtype=layer.D.dtype)
    return u, torch.randn(batch, layer.d_model, layer.d_state, dtype=layer.D.dtype)


def truth(layer: S4Layer, u: Tensor, x: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
    """One step of the dense system, which nothing is kept of."""
    A, B, C, D = layer.dense(rate=rate)
    x = torch.einsum("hij,bhj->bhi", A, x.double()) + B * u.double()[..., None]
    return (C * x).sum(-1) + D * u.double(), x


def check(layer: S4Layer, u: Tensor, x: Tensor, rate: float = 1.0, tolerance: float = 1e-12) -> None:
    y, moved = layer.step(u, x, rate=rate)
    want, want_moved = truth(layer, u, x, rate)
    close(y, want, tolerance)
    close(moved, want_moved, tolerance)


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


def new_parameter(layer: S4Layer) -> None:
    layer.C = nn.Parameter(torch.randn_like(layer.C))


def optimize(layer: S4Layer) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def swap(layer: S4Layer) -> None:
    """As exponential moving averages do: other numbers in the same tensors."""
    average = [p.data.clone() * 1.1 for p in layer.parameters()]
    for p, a in zip(layer.parameters(), average, strict=True):
        p.data, a.data = a.data, p.data


class Doubled(nn.Module):
    def forward(self, p: Tensor) -> Tensor:
        return 2 * p


def parametrized(layer: S4Layer) -> None:
    parametrize.register_parametrization(layer, "A_imag", Doubled())


def parametrized_differently(layer: S4Layer) -> None:
    parametrize.register_parametrization(layer, "D", Doubled())
    layer.parametrizations.D.original.mul_(3)
    layer.C.mul_(2)


def in_place_of_data(layer: S4Layer) -> None:
    layer.B.data.mul_(2)


def new_data(layer: S4Layer) -> None:
    layer.log_dt.data = layer.log_dt.data + 1


def flat(layer: S4Layer) -> None:
    """Views of one vector, at any offset."""
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(torch.cat([vector[:1], 1.1 * vector])[1:], layer.parameters())


def by_numpy(layer: S4Layer) -> None:
    layer.A_imag.numpy()[0, 1] += 1


def discretization(layer: S4Layer) -> None:
    layer.discretization = "bilinear"


CHANGES: list[Callable[[S4Layer], object]] = [
    optimize,
    swap,
    new_parameter,
    parametrized,
    parametrized_differently,
    in_place_of_data,
    new_data,
    flat,
    by_numpy,
    discretization,
    lambda layer: layer.load_state_dict({name: p * 1.1 for name, p in layer.state_dict().items()}),
    lambda layer: layer.C.copy_(torch.randn_like(layer.C)),
    lambda layer: layer.D.mul_(2),
    lambda layer: layer.log_A_real.add_(0.5),
    lambda layer: layer.A_imag.set_(layer.A_imag * 2),
    lambda layer: nn.init.normal_(layer.B),
    lambda layer: layer.A_imag[0, 0].fill_(7),
    lambda layer: setattr(layer.A_imag, "data", torch._neg_view(layer.A_imag.data)),
    lambda layer: layer.reset_parameters(),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("variant", ["dplr", "diag"])
@pytest.mark.usefixtures("still", "either")
def test_a_change_shows_at_the_next_step(variant: str, change: Callable[[S4Layer], object]) -> None:
    layer = build(variant)
    u, x = operands(layer)
    before = layer.step(u, x)
    change(layer)
    check(layer, u, x)
    if variant == "diag" or change is not discretization:
        assert not torch.equal(layer.step(u, x)[0], before[0])
    check(layer, u, x)


@pytest.mark.usefixtures("still", "either")
def test_other_rates_modes_and_dtypes() -> None:
    layer = build(dtype=torch.float32)
    u, x = operands(layer)
    for rate in (1.0, 0.5, 1.0, 2.0):
        check(layer, u, x, rate, 1e-5)
    layer.double()
    check(layer, u.double(), x.double())
    layer.float()
    check(layer, u, x, tolerance=1e-5)
    layer.train()
    for p in layer.parameters():
        p.mul_(1.1)
    check(layer, u, x, tolerance=1e-5)
    layer.eval()
    check(layer, u, x, tolerance=1e-5)
    layer.half()
    check(layer, u, x, tolerance=1e-5)


@fused
@pytest.mark.usefixtures("still")
def test_a_system_is_discretised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build()
    u, x = operands(layer)
    made = []
    make = op.discretize
    monkeypatch.setattr(op, "discretize", lambda systems: made.append(systems) or make(systems))
    for _ in range(3):
        layer.step(u, x)
    assert len(made) == 1
    layer.C.mul_(2)
    layer.step(u, x), layer.step(u, x)
    assert len(made) == 2
    layer.train()
    layer.step(u, x), layer.step(u, x)
    assert len(made) == 4


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(("variant", "init"), SYSTEMS)
def test_gradients_in_eval(variant: str, init: str) -> None:
    """After what was kept without them."""
    layer = build(variant, init)
    u, x = operands(layer)
    with torch.no_grad():
        layer.step(u, x)
    leaves = [u.requires_grad_(), x.requires_grad_(), *layer.parameters()]
    got, want = (sum(t.sin().sum() for t in f(u, x)) for f in (layer.step, lambda u, x: truth(layer, u, x)))
    for g, w in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        close(g, w, 1e-9)


@pytest.mark.usefixtures("either")
def test_copies_carry_nothing_kept() -> None:
    layer = build()
    u, x = operands(layer)
    names = list(layer.state_dict())
    size = len(pickle.dumps(layer))
    with torch.no_grad():
        want = layer.step(u, x)
    assert layer._kept._entry is not None
    assert list(layer.state_dict()) == names
    assert len(pickle.dumps(layer)) == size
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    replica = layer._replicate_for_data_parallel()
    for name, p in layer.named_parameters():
        setattr(replica, name, p.detach().clone())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for other in copies:
        assert other._kept._entry is None
    for other in (*copies, copy.copy(layer), replica):
        with torch.no_grad():
            close(other.step(u, x)[0], want[0], 1e-12)
            other.C = nn.Parameter(3 * other.C.detach())
            check(other, u, x)
            check(layer, u, x)


@pytest.mark.usefixtures("either", "unchecked")
def test_two_threads_of_different_rates() -> None:
    layer = build()
    u, x = operands(layer)
    wrong = []

    def work(rate: float) -> None:
        with torch.no_grad():
            want = truth(layer, u, x, rate)[0]
            for _ in range(100):
                if not torch.allclose(layer.step(u, x, rate=rate)[0], want, rtol=1e-9, atol=1e-9):
                    wrong.append(rate)

    threads = [threading.Thread(target=work, args=(rate,)) for rate in (1.0, 0.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("either")
def test_inference_mode() -> None:
    """What it keeps serves outside, too, and for a layer made inside."""
    layer = build()
    u, x = operands(layer)
    with torch.inference_mode():
        check(layer, u, x)
        made = build("diag")
        check(made, u, x)
        made.C.mul_(2)
        check(made, u, x)
    with torch.no_grad():
        check(layer, u, x)
        check(made, u, x)
    y, _ = layer.step(u.requires_grad_(), x)
    y.sum().backward()
    assert u.grad is not None


def test_kept_by_address_and_version() -> None:
    """As on a GPU; "meta" stands for it, as anything but the CPU does."""
    cache = Kept()
    t = torch.ones(3, device="meta")
    first = cache.of([t], 1.0)
    assert cache.of([t], 1.0) is first
    assert cache.of([t], 2.0) is not first
    second = cache.of([t], 1.0)
    t.mul_(2)
    assert cache.of([t], 1.0) is not second
    with torch.inference_mode():
        t = torch.ones(3, device="meta")
        assert cache.of([t], 1.0) is not cache.of([t], 1.0)


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

MANY = """
import gc, torch
from s4 import S4Layer
torch.manual_seed(0)

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

layer = S4Layer(2, 4).eval()
u, x = torch.randn(1, 2), layer.initial_state(1)
with torch.no_grad():
    for steps in (5_000, 50_000):
        for _ in range(steps):
            y, x = layer.step(u, x)
        gc.collect()
        print(resident(), len(gc.get_objects()))
"""


def test_one_graph_serves_all_steps() -> None:
    """In eval it discretises at first and after a change, as eager steps do; in training the graph does."""
    assert run(COMPILE).split() == ["1", "4" if FUSED else "2", "1", "0"] * 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident set from /proc")
def test_many_steps_hold_no_more_than_few() -> None:
    before, objects, after, more = map(int, run(MANY).split())
    assert after - before < 2048  # KiB
    assert more - objects < 50


def test_kept_numbers_are_those_of_the_layer() -> None:
    """The fields of a recurrence, in the dtype of the parameters and contiguous, as raw memory is read."""
    for variant, init in SYSTEMS:
        layer = build(variant, init, dtype=torch.float32, n_ssm=H)
        with torch.no_grad():
            layer.step(*operands(layer))
            entry = layer._kept._entry
            layer.step(*operands(layer))
        assert layer._kept._entry is entry
        kept, D = entry[-1]["rounded"]
        assert isinstance(kept, Recurrence)
        assert all(t.is_contiguous() and t.dtype == torch.float32 for t in (*kept, D))
        assert D.data_ptr() != layer.D.data_ptr()


def test_snapshot_of_another_number_of_tensors() -> None:
    """A layer may come to lie where one of another variant was, which has a parameter more."""
    tensors = [torch.randn(3), torch.randn(2, 2)]
    snapshot = cpu.Snapshot(tensors)
    assert snapshot.matches(tensors)
    assert not snapshot.matches(tensors[:1])
    assert not snapshot.matches([*tensors, torch.randn(1)])


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


@pytest.mark.usefixtures("still")
def test_nothing_is_kept_of_what_is_followed() -> None:
    """Fake tensors have no numbers to keep; a graph that was traced has an operator in it."""
    layer = S4Layer(4, 10).eval()
    u, x = torch.randn(3, 4), torch.randn(3, 4, 10)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer.step(mode.from_tensor(u), mode.from_tensor(x))
    want = layer.step(u, x)
    graph = make_fx(lambda u, x: layer.step(u, x), pre_dispatch=True)(u, x)
    for got, expected in zip(graph(u, x), want, strict=True):
        close(got, expected, 1e-6)
