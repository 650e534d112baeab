"""The Triton backend in Triton's interpreter: `test_triton.py` runs this file in a process of its own."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import s4.kernel
from s4.backends import cpu, triton
from s4.ops import cauchy as _ops
from s4.ops import dispatch

CPU = torch.device("cpu")
DTYPES = {torch.complex64: 2e-6, torch.complex128: 1e-13}  # and the error allowed, of the largest value

# G, q, n, l: rows of one and of two programs, padded and not; blocks of poles and of nodes, likewise; at last
# enough nodes for gradients in parts that are added up
SIZES = [
    (1, 1, 1, 1),
    (2, 2, 3, 129),
    (3, 3, 9, 17),
    (2, 4, 5, 300),
    (1, 6, 2, 128),
    (2, 9, 3, 40),
    (1, 1, 2, 1100),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory holds NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128).to(dtype)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def check_cauchy(v: Tensor, z: Tensor, w: Tensor, need_z: bool) -> None:
    dtype, tolerance = v.dtype, DTYPES[v.dtype]
    grad = numbers(*v.shape[:2], z.shape[1], dtype=dtype)
    exact = [t.to(torch.complex128).requires_grad_() for t in (v, z, w)]
    V, Z, W = exact[0][..., None], exact[1][:, None, None], exact[2][:, None, :, None]
    sums = (V / (Z - W) + V.conj() / (Z - W.conj())).sum(2)
    want = torch.autograd.grad(sums, exact, grad.to(torch.complex128))
    close(triton.cauchy(v, z, w), sums.detach(), tolerance)
    grad_v, grad_z, grad_w = triton.cauchy_backward(grad, v, z, w, need_z)
    close(grad_v, want[0], tolerance)
    close(grad_w, want[2], tolerance)
    if need_z:
        close(grad_z, want[1], tolerance)
    else:
        assert grad_z.shape == (0,)
    assert all(t.dtype == dtype and t.is_contiguous() for t in (grad_v, grad_z, grad_w))


def test_it_runs_here_and_auto_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert s4.kernel.backends()["triton"]["cauchy"] is True
    assert triton.status(CPU) is True
    assert "on the CPU" in str(triton.status(torch.device("cuda", 0)))
    monkeypatch.setattr(cpu, "_library", lambda: "not built")
    assert dispatch.implementation("cauchy", "auto", CPU) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("common", [True, False], ids=["common nodes", "own nodes"])
def test_cauchy(sizes: tuple[int, int, int, int], common: bool, dtype: torch.dtype) -> None:
    G, q, n, nodes = sizes
    z = numbers(1 if common else G, nodes, dtype=dtype)
    w = numbers(G, n, dtype=dtype)
    z, w = z + 4, w - 1  # apart
    check_cauchy(numbers(G, q, n, dtype=dtype), z, w, need_z=common or q != 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nodes_close_to_poles(dtype: torch.dtype) -> None:
    """At 1e-4 |w| from a pole w, z^2 - 2 z Re w + |w|^2 has no digit left in float32."""
    w = torch.tensor([[-1e-4 + 100j, -0.5 + 3j]], dtype=dtype)
    z = torch.tensor([[0.01 + 100j, 100.02j, -0.4999 + 3.0001j, 1 + 99j]], dtype=dtype)
    check_cauchy(numbers(1, 2, 2, dtype=dtype), z, w, need_z=True)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty_sums_and_their_gradients_are_zero(sizes: tuple[int, int, int, int]) -> None:
    G, q, n, nodes = sizes
    v, w = numbers(G, q, n, dtype=torch.complex64), numbers(G, n, dtype=torch.complex64)
    z, grad = numbers(1, nodes, dtype=torch.complex64), numbers(G, q, nodes, dtype=torch.complex64)
    close_to_zero = [
        (triton.cauchy(v, z, w), grad),
        *zip(triton.cauchy_backward(grad, v, z, w, True), (v, z, w), strict=True),
    ]
    for got, like in close_to_zero:
        assert got.shape == like.shape
        assert not got.any()


def test_it_is_a_sound_operator() -> None:
    v, w = (numbers(*shape, dtype=torch.complex128) for shape in ((1, 2, 2), (1, 2)))
    z, grad = numbers(1, 3, dtype=torch.complex128), numbers(1, 2, 3, dtype=torch.complex128)
    for operator, inputs in {
        _ops.cauchy: (v, z, w),
        _ops.cauchy_backward: (grad, v, z, w, True),
    }.items():
        torch.library.opcheck(operator, (*inputs, "triton"), test_utils=("test_schema", "test_faketensor"))
