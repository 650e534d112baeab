"""What a layer keeps of its parameters in evaluation: never out of date, and no more than it needs."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import close
from step_cases import SYSTEMS, H, build, check, fused, operands, truth
from test_process import run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

from s4 import S4Layer
from s4.backends import cpu
from s4.ops import step as op
from s4.ops.kept import Kept
from s4.system import Recurrence


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
