"""The CUDA backend without a GPU: its source run on the CPU by an emulator of blocks and threads, and
compiled for GPUs to see that it fits their registers."""

import ctypes
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s4.backends import cuda
from s4.ops import dispatch

TESTS = Path(__file__).parent
EPS = {torch.complex64: 2.0**-23, torch.complex128: 2.0**-52}
GUARD = 64  # bytes on either side of a buffer


class Emulator:
    """Stands in for `cuda._launch`: the same names, geometry and arguments, on CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launched: list[tuple[str, int, int]] = []
        self.most_blocks = 1 << 62

    def __call__(self, name: str, blocks: int, threads: int, tensors: list[Tensor], sizes: list[int]) -> None:
        if blocks == 0:
            return
        self.launched.append((name, blocks, threads))
        stored = [bytes(t.untyped_storage()) for t in tensors]
        nan = [b"\xff" * len(s) for s in stored]
        self.run(name, blocks, threads, tensors, sizes, nan, seed=1)
        first = self.run(name, blocks, threads, tensors, sizes, stored, seed=2)
        second = self.run(name, blocks, threads, tensors, sizes, stored, seed=3)
        assert first == second, f"{name} depends on the order of its threads"
        for tensor, data in zip(tensors, first, strict=True):
            if data:
                ctypes.memmove(tensor.untyped_storage().data_ptr(), data, len(data))

    def run(
        self,
        name: str,
        blocks: int,
        threads: int,
        tensors: list[Tensor],
        sizes: list[int],
        stored: list[bytes],
        seed: int,
    ) -> list[bytes]:
        """What the storages hold afterwards; each lies between guards of NaN, that must be there still."""
        guard = b"\xff" * GUARD
        buffers = [
            ctypes.create_string_buffer(guard + data + guard, len(data) + 2 * GUARD) for data in stored
        ]
        pointers = [
            ctypes.addressof(b) + GUARD + t.storage_offset() * t.element_size()
            for b, t in zip(buffers, tensors, strict=True)
        ]
        values = (ctypes.c_int64 * (len(pointers) + len(sizes)))(*pointers, *sizes)
        kernel = ctypes.cast(self.library[name], ctypes.c_void_p)
        blocks = min(blocks, self.most_blocks)
        failed = self.library.emulate(
            kernel, *map(ctypes.c_int64, (blocks, threads)), values, *map(ctypes.c_int64, (len(values), seed))
        )
        assert not failed, f"threads of {name} wait at a barrier that others do not reach"
        for buffer in buffers:
            assert buffer.raw[:GUARD] == buffer.raw[-GUARD:] == guard, f"{name} writes outside of its arrays"
        return [buffer.raw[GUARD:-GUARD] for buffer in buffers]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ on Linux")
    folder = tmp_path_factory.mktemp("emulator")
    main = folder / "main.cpp"
    main.write_text(f'#include "{TESTS / "cuda_emulator.h"}"\n#include "{cuda._SOURCE}"\n')
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", folder / "emulator.so", main], check=True)
    return ctypes.CDLL(str(folder / "emulator.so"))


@pytest.fixture
def emulator(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """`cuda` on CPU tensors; what torch allocates is filled with NaN, so that what is not written shows."""
    found = Emulator(library)
    monkeypatch.setattr(cuda, "_launch", found)
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(2).new_empty(3).isnan().all()
    yield found
    torch.use_deterministic_algorithms(False)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128)


def poles(G: int, n: int) -> Tensor:
    w = draw(G, n)
    return torch.complex(-w.real.abs() - 0.1, 5 * w.imag)


def nodes(groups: int, count: int) -> Tensor:
    z = draw(groups, count)
    return torch.complex(z.real.abs() + 0.05, 5 * z.imag)


def dense_cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    v, z, w = v[..., None], z[:, None, None, :], w[:, None, :, None]
    return (v / (z - w) + v.conj() / (z - w.conj())).sum(2)


def check(got: Tensor, want: Tensor, scale: Tensor, eps: float, what: str) -> None:
    """|got - want| <= eps * scale: scale is the sum of the terms' sizes, which rounding is relative to."""
    assert got.shape == want.shape, what
    worst = ((got.to(want.dtype) - want).abs() / scale.clamp_min(1e-30)).nan_to_num(float("inf"))
    assert worst.numel() == 0 or worst.max() <= eps, f"{what}: {worst.max() / eps:.2f} of the bound"


def check_cauchy(v: Tensor, z: Tensor, w: Tensor, grad: Tensor, need_z: bool = True, ulps: float = 8) -> None:
    eps = ulps * EPS[v.dtype]
    got = cuda.cauchy(v, z, w)
    grads = cuda.cauchy_backward(grad, v, z, w, need_z)
    assert got.dtype == v.dtype
    V, Z, W, D = (t.to(torch.complex128) for t in (v, z, w, grad))
    leaves = [t.requires_grad_() for t in (V, Z, W)]
    want = dense_cauchy(V, Z, W)
    truth = torch.autograd.grad(want, leaves, D)
    with torch.no_grad():
        a, b = (1 / (Z[:, None] - w[..., None]).abs() for w in (W, W.conj()))  # (G, n, l)
        check(got, want, V.abs() @ (a + b), eps, "sums")
        check(grads[0], truth[0], D.abs() @ (a + b).mT, eps, "gradient of v")
        squares = a**2 + b**2
        check(grads[2], truth[2], (V.abs() * (D.abs() @ squares.mT)).sum(1), 2 * eps, "gradient of w")
        if need_z:
            scale = (D.abs() * (V.abs() @ squares)).sum(1).sum_to_size(Z.shape)
            check(grads[1], truth[1], scale, 2 * eps, "gradient of z")
        else:
            assert grads[1].numel() == 0


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("groups", [1, 2], ids=["shared nodes", "nodes of each group"])
@pytest.mark.parametrize("q", [1, 2, 3, 4, 5, 6, 7, 13])
def test_cauchy(emulator: Emulator, q: int, groups: int, dtype: torch.dtype) -> None:
    n, length = 17 + q, 33 - q
    v, z, w, grad = (
        t.to(dtype) for t in (draw(2, q, n), nodes(groups, length), poles(2, n), draw(2, q, length))
    )
    check_cauchy(v, z, w, grad, need_z=q % 3 != 0)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize(
    ("G", "q", "n", "length"),
    [
        (1, 1, 1, 1),
        (3, 1, 3, 300),
        (1, 4, 32, 513),
        (1, 2, 65, 17),
        (2, 1, 33, 2),
        (40, 1, 2, 1),
        (1, 1, 1, 1300),
    ],
)
def test_cauchy_of_odd_sizes(
    emulator: Emulator, G: int, q: int, n: int, length: int, dtype: torch.dtype
) -> None:
    given = draw(G, q, n), nodes(1, length), poles(G, n), draw(G, q, length)
    v, z, w, grad = (t.to(dtype) for t in given)
    check_cauchy(v, z, w, grad)


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_cauchy_next_to_poles_and_far_away(emulator: Emulator, dtype: torch.dtype) -> None:
    """Near a pole, an expanded |z-w|^2 would cancel; far away, the squares of distances overflow in float."""
    w = torch.tensor([[-1e-4 + 100j, -0.5 + 3j]], dtype=dtype)
    z = torch.tensor(
        [[0.01 + 100j, 100.02j, 1 + 99j, -1e-4 - 99.9j, 1e9 + 1j, -0.5 + 3.001j, 3e5j]], dtype=dtype
    )
    check_cauchy(draw(1, 2, 2).to(dtype), z, w, draw(1, 2, 7).to(dtype))
    far = torch.tensor([[1e25 + 0j]], dtype=dtype)
    assert (cuda.cauchy(draw(1, 1, 2).to(dtype), far, w).abs() < 1e-24).all()


@pytest.mark.parametrize("sizes", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)], ids=str)
def test_empty(emulator: Emulator, sizes: tuple[int, int, int, int]) -> None:
    G, q, n, length = sizes
    v, z, w, grad = draw(G, q, n), nodes(1, length), poles(G, n), draw(G, q, length)
    check_cauchy(v, z, w, grad)


def test_any_grid_computes_the_same(emulator: Emulator) -> None:
    """Blocks loop over tasks: a grid has limits, sizes have none."""
    v, z, w, grad = draw(5, 2, 3), nodes(1, 40), poles(5, 3), draw(5, 2, 40)
    runs = []
    for emulator.most_blocks in (1 << 62, 3):
        runs.append([cuda.cauchy(v, z, w), *cuda.cauchy_backward(grad, v, z, w, True)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_geometry_fills_a_gpu_and_bounds_what_it_stores() -> None:
    for G, n, length in [(1, 1, 100_000), (1, 32, 65536), (512, 32, 513), (512, 32, 8193), (4, 257, 1047)]:
        blocks, lanes, parts, span = cuda._by_poles(G, n, length)
        assert blocks >= min(2048, G * n * length // 4096), "too few blocks"
        assert (parts - 1) * span < length <= parts * span
        assert span <= 2048
        assert lanes <= 32
        assert parts * G * n <= max(G * n * length / 100, 2 * 2048 * 32), "parts of sums, nothing near G n l"
    for G, length, warps in [(1, 1, 1), (3, 513, 18), (512, 8193, 264), (1, 256, 8), (1, 257, 10)]:
        blocks, threads = cuda._by_nodes(G, length)
        assert threads % 32 == 0
        assert threads <= 256
        assert blocks * threads == G * warps * 32


def registers(report: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of spills of each kernel, from what ptxas reports."""
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) r"
    found = re.findall(pattern, report, re.DOTALL)
    return {name: (int(used), int(stores) + int(loads)) for name, stores, loads, used in found}


def entry_points() -> set[str]:
    names = ("cauchy", "cauchy_backward", "cauchy_backward_nodes")
    return {f"{name}_{suffix}_{q}" for name in names for suffix in ("c64", "c128") for q in range(1, 7)}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_spilled_registers(
    arch: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    compiler = shutil.which("nvcc")
    if compiler:
        flags = ["-std=c++17", f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
        command = [compiler, *flags, "-o", str(tmp_path / "sums.cubin"), str(cuda._SOURCE)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    else:
        report = nvrtc_report(arch)
    found = registers(report)
    assert found.keys() == entry_points()
    assert {name: spills for name, (_, spills) in found.items() if spills} == {}
    for name, (used, _) in found.items():
        record_property(f"{arch} {name}", used)
        assert used <= 128, f"{name} leaves room for less than 16 warps"


def nvrtc_report(arch: str) -> str:
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        pytest.skip(f"needs nvcc or cuda.core: {error}")
    log = io.StringIO()
    options = ProgramOptions(arch=arch, ptxas_options="-v", **cuda._OPTIONS)
    try:
        Program(cuda._SOURCE.read_text(), "c++", options).compile("cubin", logs=log)
    except Exception as error:
        pytest.skip(f"NVRTC cannot run: {error}")
    return log.getvalue()


def test_nvrtc_compiles_it_with_the_options_of_the_backend() -> None:
    pytest.importorskip("cuda.core")
    try:
        code = cuda._compile("sm_90")
    except Exception as error:
        if "Failure finding" in str(error):
            pytest.skip(f"no NVRTC: {error}")
        raise
    assert code.startswith(b"\x7fELF")
    assert all(name.encode() in code for name in entry_points())


def test_status_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert isinstance(cuda.status(cpu), str)
    assert dispatch.implementation("cauchy", "auto", cpu) is not cuda
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "not on cpu" in str(cuda.status(cpu))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert 'pip install "s4-pytorch[cuda]"' in str(cuda._probe(cpu))


def test_source_is_shipped() -> None:
    """Where the package is installed, the source lies beside the module that compiles it."""
    assert cuda._SOURCE.is_file()
    assert '"s4.backends.cuda" = ["kernels.cu"]' in (TESTS.parent / "pyproject.toml").read_text()
