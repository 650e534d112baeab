"""Where operators, what is kept, transforms and the user's own settings meet: each was wrong once."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import s4.kernel
from s4 import S4Layer, backends, hippo

VARIANTS = ["dplr", "diag"]
# What torch now recommends in place of set_float32_matmul_precision, which raises once one of them is set.
SETTINGS: list[tuple[Any, str]] = [
    (torch.backends.cuda.matmul, "tf32"),
    (torch.backends, "tf32"),
    (torch.backends.mkldnn.matmul, "bf16"),
]


@pytest.fixture(params=range(len(SETTINGS)), ids=["cuda.matmul", "all", "mkldnn.matmul"])
def newer(request: pytest.FixtureRequest) -> Iterator[None]:
    holder, value = SETTINGS[request.param]
    before = holder.fp32_precision
    holder.fp32_precision = value
    yield
    holder.fp32_precision = before


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.usefixtures("newer")
def test_torchs_newer_settings_of_precision_do_not_reach_a_layer(mode: str, backend: str) -> None:
    layer = S4Layer(4, 16, mode=mode, backend=backend)
    wide = S4Layer(**{**layer.config(), "dtype": "float64"})
    wide.load_state_dict(layer.state_dict())
    u = torch.randn(2, 300, 4)
    for got, want in zip(layer(u, return_state=True), wide(u.double(), return_state=True), strict=True):
        oracle.close(got, want, 1e-5)


@pytest.mark.usefixtures("unchecked")
def test_what_is_kept_follows_the_shape_and_dtype_of_D() -> None:
    layer = S4Layer(64, 8).eval()
    u, x = torch.randn(1, 64), layer.initial_state(1)
    with torch.no_grad():
        y, _ = layer.step(u, x)
        D = layer.D
        layer.D = nn.Parameter(torch.zeros(2))
        with pytest.raises(ValueError, match=r"D must have shape \(64,\), got \(2,\)"):
            layer.step(torch.randn(1, 2), x)
        with pytest.raises(ValueError, match=r"D must have shape \(64,\)"):
            layer(torch.randn(1, 5, 2))
        layer.D = nn.Parameter(D.double())
        oracle.close(layer.step(u, x.double())[0], y, 1e-6)
        layer.D = D
        assert torch.equal(layer.step(u, x)[0], y)


@pytest.mark.parametrize("L", [5, 20, 40])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("trained", ["u", "C", "D", "all"])
def test_gradients_of_gradients_of_whatever_is_trained(trained: str, backend: str, L: int) -> None:
    """Also below the length of a chunk, where no state depends on anything."""
    layers = [S4Layer(2, 8, mode=mode, backend=backend, dtype=torch.float64) for mode in ("scan", "fft")]
    layers[1].load_state_dict(layers[0].state_dict())
    u = torch.randn(1, L, 2, dtype=torch.float64, requires_grad=trained in ("u", "all"))
    found = []
    for layer in layers:
        for name, p in layer.named_parameters():
            p.requires_grad_(trained in (name, "all"))
        leaves = [t for t in (u, *layer.parameters()) if t.requires_grad]
        grads = torch.autograd.grad(layer(u).pow(3).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for got, want in zip(*found, strict=True):
        oracle.close(got, want, 1e-8)


def test_autocast_does_not_reach_vandermonde() -> None:
    v, x = torch.randn(3, 8) + 1j, torch.complex(-torch.rand(3, 8), torch.randn(3, 8))
    want = s4.kernel.vandermonde(v, x, 200)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(s4.kernel.vandermonde(v, x, 200), want)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_backward_pass_inside_autocast_keeps_its_digits(backend: str) -> None:
    layer = S4Layer(4, 16, mode="scan", backend=backend)
    u = torch.randn(2, 100, 4, requires_grad=True)
    want = torch.autograd.grad(layer(u).square().sum(), [u, *layer.parameters()])
    loss = layer(u).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, [u, *layer.parameters()])
    for g, w in zip(got, want, strict=True):
        oracle.close(g, w, 1e-5)


@pytest.mark.parametrize(
    ("v", "x", "want"),
    [((3, 0), (3, 0), (3, 5)), ((0, 8), (8,), (0, 5)), ((3, 0, 8), (1, 8), (3, 0, 5)), ((0,), (0,), (5,))],
)
def test_vandermonde_of_nothing(v: tuple[int, ...], x: tuple[int, ...], want: tuple[int, ...]) -> None:
    K = s4.kernel.vandermonde(torch.randn(v) + 0j, torch.randn(x) + 0j, 5)
    assert K.shape == want
    assert not K.any()


def test_ones_own_tensors_may_be_conjugated_arrays_or_changed_later() -> None:
    Lambda, P, B = hippo.dplr("legs", 8)
    layer = S4Layer(2, 8, init=(Lambda, P.conj(), B))
    again = S4Layer(2, 8, init=(Lambda.numpy(), P.resolve_conj().conj().resolve_conj().numpy(), B.numpy()))
    assert layer.config() == again.config()
    before = layer.config()
    Lambda.mul_(3)
    assert layer.config() == before
    with pytest.raises(TypeError, match=r"Lambda of init must hold complex numbers.*meta"):
        S4Layer(2, 8, init=(Lambda.to("meta"), P, B))


def test_a_layer_with_ones_own_tensors_is_made_without_numbers() -> None:
    """As frameworks do that plan a model's memory before they make it."""
    own = [torch.view_as_real(part).tolist() for part in hippo.dplr("legs", 8)]
    with FakeTensorMode():
        layer = S4Layer(2, 8, init=own)
        y, state = layer(torch.randn(3, 9, 2), lengths=torch.tensor([9, 1, 0]), return_state=True)
    assert (y.shape, state.shape) == ((3, 9, 2), (3, 2, 8))


@pytest.mark.parametrize("where", ["forward", "step", "kernel"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_named_backend_that_cannot_run_where_the_layer_is_says_so(
    where: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = SimpleNamespace(status=lambda device: device.type == "cuda" or f"not on {device}")
    monkeypatch.setitem(backends.BACKENDS, "elsewhere", elsewhere)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    layer = S4Layer(2, 8, variant=variant, backend="elsewhere")
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: layer(torch.randn(1, 9, 2)),
        "step": lambda: layer.step(torch.randn(1, 2), layer.initial_state(1)),
        "kernel": lambda: layer.kernel(9),
    }
    with pytest.raises(ValueError, match="backend 'elsewhere' cannot run: not on cpu"):
        calls[where]()
    z = torch.ones(3) + 0j
    with pytest.raises(ValueError, match="backend 'elsewhere' cannot run: not on cpu"):
        s4.kernel.cauchy(z, 2 * z, -z, backend="elsewhere")


@pytest.mark.parametrize("backend", ["auto", "torch", "cpu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_on_meta_has_shapes(variant: str, backend: str) -> None:
    if isinstance(s4.kernel.backends()[backend] if backend != "auto" else {}, str):
        backend = "auto"
    layer = S4Layer(2, 8, variant=variant, backend=backend, device="meta")
    for mode in ("fft", "scan"):
        layer.mode = mode
        assert layer(torch.randn(3, 20, 2, device="meta")).shape == (3, 20, 2)


@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_func_sees_through_a_layer(variant: str, mode: str) -> None:
    layer = S4Layer(2, 8, variant=variant, mode=mode, backend="torch", dtype=torch.float64)
    u = torch.randn(2, 20, 2, dtype=torch.float64)
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (u,)).square().sum()

    layer(u).square().sum().backward()
    for name, grad in torch.func.grad(loss)(values).items():
        oracle.close(grad, layer.get_parameter(name).grad, 1e-9, name)


@pytest.mark.usefixtures("unchecked")
def test_a_traced_step_follows_its_inputs() -> None:
    """What is computed without operators must not be taken for a constant."""
    layer = S4Layer(3, 8).eval().requires_grad_(False)
    u, x = torch.randn(2, 3), torch.randn(2, 3, 8)
    with torch.no_grad():
        traced = torch.jit.trace(lambda u, x: layer.step(u, x), (u, x), check_trace=False)
        for got, want in zip(traced(2 * u, -x), layer.step(2 * u, -x), strict=True):
            oracle.close(got, want, 1e-6)


def test_subclasses_and_numbers_of_other_types() -> None:
    class Wide(S4Layer):
        def __init__(self, width: int) -> None:
            self.d_model = width
            super().__init__(width, 8, dt_min=torch.tensor(0.01).item(), dtype="torch.float64")

    layer = Wide(4)
    assert layer.config()["dtype"] == "float64"
    assert type(layer.config()["dt_min"]) is float
    with pytest.raises(AttributeError, match="d_model is read-only"):
        layer.d_model = 4
    S4Layer.__init__(layer, 6, 8)
    assert layer.D.shape == (6,)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_mode_derivatives_of_a_layer(variant: str, mode: str, backend: str) -> None:
    """A layer is linear in its inputs: the derivative along v is what it gives for v."""
    layer = S4Layer(2, 8, variant=variant, mode=mode, backend=backend, dtype=torch.float64)
    u, v = torch.randn(2, 2, 40, 2, dtype=torch.float64)
    _, along = torch.func.jvp(lambda u: layer(u), (u,), (v,))
    oracle.close(along, layer(v), 1e-9)


def test_lengths_without_numbers_are_taken() -> None:
    """On "meta", where shapes are all that there is."""
    with torch.device("meta"):
        layer, u, lengths = S4Layer(4, 8), torch.randn(2, 9, 4), torch.zeros(2, dtype=torch.long)
    assert layer(u, lengths=lengths).shape == (2, 9, 4)
