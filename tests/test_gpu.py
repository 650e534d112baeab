"""What only a GPU can show: CUDA graphs, streams, autocast, compilation and several devices."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
from processes import printed, process
from torch import Tensor

import s4.kernel
from s4 import S4Layer
from s4.backends import BACKENDS, cuda
from s4.ops import dispatch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
USABLE = [name for name, it in BACKENDS.items() if name != "naive" and it.status(CUDA) is True]

GRAPHED = [name for name in USABLE if name != "keops"]  # which waits for the stream, as no graph can


def draw(*shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128).to(dtype).to(CUDA)


def problem(dtype: torch.dtype, G: int = 64, q: int = 4, n: int = 32, nodes: int = 513) -> list[Tensor]:
    """v, z and w of the sums, on the GPU."""
    z, w = draw(1, nodes), draw(G, n)
    z, w = torch.complex(z.real.abs() + 0.05, 5 * z.imag), torch.complex(-w.real.abs() - 0.1, 5 * w.imag)
    return [draw(G, q, n, dtype=dtype), z.to(dtype), w.to(dtype)]


def value_and_gradients(sums: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = sums(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).real.sum(), leaves)]


def grouped(backend: str) -> Callable[..., Tensor]:
    return lambda v, z, w: s4.kernel.cauchy(v, z, w[:, None], backend=backend)


def test_cuda_backend_runs_where_its_libraries_are() -> None:
    pytest.importorskip("cuda.core")
    assert cuda.status(CUDA) is True
    assert dispatch.implementation("cauchy", "auto", CUDA) is cuda


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("backend", USABLE)
def test_backend_agrees_with_the_definition(backend: str, dtype: torch.dtype) -> None:
    tolerance = 5e-6 if dtype == torch.complex64 else 1e-12
    v, z, w = problem(dtype)
    got = value_and_gradients(grouped(backend), v, z, w)
    want = value_and_gradients(grouped("naive"), *(t.to(torch.complex128) for t in (v, z, w)))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        oracle.close(a, b, tolerance, f"cauchy {i}")


@pytest.mark.parametrize("backend", USABLE)
def test_single_terms_keep_their_digits_near_a_pole(backend: str) -> None:
    """With one pole nothing averages out what the hardware's reciprocal gets wrong."""
    w = torch.tensor([-1e-4 + 100j], dtype=torch.complex64, device=CUDA)
    distance = torch.logspace(-3, 12, 4096, dtype=torch.float64, device=CUDA)
    z = (w + torch.polar(distance, 0.7 * distance.sqrt())).to(torch.complex64)
    v = torch.ones(1, dtype=torch.complex64, device=CUDA)
    got = s4.kernel.cauchy(v, z, w, backend)
    Z, W = z.to(torch.complex128), w.to(torch.complex128)
    first, second = 1 / (Z - W), 1 / (Z - W.conj())
    assert ((got - first - second).abs() <= 1e-6 * (first.abs() + second.abs())).all()


@pytest.mark.skipif("cuda" not in USABLE, reason="the cuda backend cannot run")
def test_cuda_backend_gives_the_same_bits_each_time() -> None:
    v, z, w = problem(torch.complex64, nodes=5001)
    first, second = (value_and_gradients(grouped("cuda"), v, z, w) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif("cuda" not in USABLE, reason="the cuda backend cannot run")
def test_sizes_are_of_64_bits() -> None:
    G, nodes = 2**15, 2**16 + 1
    if torch.cuda.mem_get_info(CUDA)[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    v, z, w = problem(torch.complex64, G, 1, 1, nodes)
    got = s4.kernel.cauchy(v[:, 0], z[0], w, "cuda")[-1]
    want = s4.kernel.cauchy(v[-1, 0], z[0], w[-1], "naive")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def replayed(run: Callable[[], Tensor], refill: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """What a CUDA graph of `run` gives after its inputs have changed, and what `run` gives itself."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    refill()
    graph.replay()
    return out.clone(), run()


@pytest.mark.parametrize("backend", GRAPHED)
def test_graph_records_the_sums(backend: str) -> None:
    v, z, w = problem(torch.complex64)
    got, want = replayed(lambda: grouped(backend)(v, z, w), lambda: v.copy_(draw(*v.shape)))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", GRAPHED)
def test_graph_records_the_gradients_of_the_sums(backend: str) -> None:
    v, z, w = problem(torch.complex64)
    got, want = replayed(
        lambda: torch.cat([t.flatten() for t in value_and_gradients(grouped(backend), v, z, w)]),
        lambda: v.copy_(draw(*v.shape)),
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variant", ["dplr", "diag"])
@pytest.mark.parametrize("backend", ["auto", *GRAPHED])
def test_graph_records_a_layer(backend: str, variant: str) -> None:
    layer = S4Layer(8, 16, variant=variant, backend=backend, device=CUDA).eval()
    u = torch.randn(2, 100, 8, device=CUDA)
    with torch.no_grad():
        got, want = replayed(lambda: layer(u), lambda: u.normal_())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        state = layer.initial_state(2)
        got, want = replayed(lambda: layer.step(u[:, 0], state)[0], lambda: state.normal_())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("cuda" not in USABLE, reason="the cuda backend cannot run")
def test_capture_before_the_first_use_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    v, z, w = problem(torch.complex64)
    monkeypatch.setattr(cuda, "_kernels", {})
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        kept = v + 1
        with pytest.raises(RuntimeError, match="run the same operation once before the capture"):
            grouped("cuda")(v, z, w)
    assert kept.shape == v.shape


@pytest.mark.parametrize("backend", USABLE)
def test_sums_follow_the_current_stream(backend: str) -> None:
    """On a side stream they wait for what is queued there; on the default one they would not."""
    v, z, w = problem(torch.complex64)
    want = grouped(backend)(2 * v, z, w)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # some 0.1 s
        doubled = 2 * v
        got = grouped(backend)(doubled, z, w)
    side.synchronize()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", USABLE)
def test_sums_run_in_a_thread_that_is_new_to_cuda(backend: str) -> None:
    v, z, w = problem(torch.complex64)
    want = grouped(backend)(v, z, w)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(grouped(backend), v, z, w).result()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["dplr", "diag"])
def test_autocast_leaves_the_arithmetic_alone(variant: str, dtype: torch.dtype) -> None:
    layer = S4Layer(8, 16, variant=variant, device=CUDA)
    u = torch.randn(2, 300, 8, device=CUDA)
    want, kernel = layer(u), layer.kernel(300)
    with torch.autocast("cuda", dtype):
        assert torch.equal(layer.kernel(300), kernel)
        assert layer(u).dtype == torch.float32
        y, state = layer(u.to(dtype), return_state=True)
        y.float().square().sum().backward()
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    oracle.close(y, want, 2e-2 if dtype == torch.bfloat16 else 5e-3)


COMPILED = """
import sys
import torch
from s4 import S4Layer
variant, backend = sys.argv[1:]
torch.manual_seed(0)
layer = S4Layer(8, 16, variant=variant, backend=backend, device="cuda")
compiled = torch.compile(layer, fullgraph=True)
for length in (64, 100):
    u = torch.randn(2, length, 8, device="cuda")
    grads = []
    for each in (layer, compiled):
        layer.zero_grad()
        y = each(u)
        y.square().sum().backward()
        grads.append([y.detach(), *(p.grad for p in layer.parameters())])
    for got, want in zip(*reversed(grads)):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
"""


@pytest.mark.parametrize("variant", ["dplr", "diag"])
@pytest.mark.parametrize("backend", ["auto", *USABLE])
def test_compiled_layer_is_the_layer(backend: str, variant: str) -> None:
    """In a process of its own: torch 2.11 cannot trace the shape checks of pytest."""
    printed(process(COMPILED, variant, backend))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", USABLE)
def test_sums_run_where_their_tensors_are(backend: str) -> None:
    v, z, w = problem(torch.complex64)
    want = value_and_gradients(grouped(backend), v, z, w)
    other = [t.to("cuda:1") for t in (v, z, w)]  # while device 0 is the current one
    for got, there in zip(value_and_gradients(grouped(backend), *other), want, strict=True):
        assert got.device == torch.device("cuda", 1)
        torch.testing.assert_close(got.to(CUDA), there)
