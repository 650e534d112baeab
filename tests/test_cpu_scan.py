"""The fused chunked scan against loops over chunks: any layout of its sequences, any number of channels."""

from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import close
from torch import Tensor

import s4.kernel
from s4.backends import cpu
from s4.ops import scan

if isinstance(s4.kernel.backends()["cpu"], str):
    pytest.skip("the C++ extension is not built", allow_module_level=True)
B, N, T = 2, 4, 8

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda u: u.contiguous(),
    "time beside time": lambda u: u.mT.contiguous().mT,
    "batch beside batch": lambda u: u.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every second channel": lambda u: torch.stack([u, u + 1], -1)[..., 0],
    "part of wider rows": lambda u: torch.cat([u, u, u], -1)[..., u.shape[-1] : 2 * u.shape[-1]],
    "one number": lambda u: torch.ones((), dtype=u.dtype).expand(u.shape),
    "one sequence": lambda u: u[:1].expand(u.shape),
    "negated": lambda u: torch._neg_view(u),
}


@pytest.fixture(params=["torch's threads", "its own"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Three, from where torch has its threads, and as where that cannot be found."""
    library, before = cpu._library(), torch.get_num_threads()
    assert not isinstance(library, str)
    try:
        torch.set_num_threads(3)
        if request.param == "its own":
            library.s4_pool(None)
        yield
    finally:
        torch.set_num_threads(before)
        library.s4_pool(cpu._pool())


def operands(L: int, H: int, dtype: torch.dtype, B: int = B) -> list[Tensor]:
    shapes = (B, L, H), (H, B, N), (H, 2 * T - 1), (H, T, N), (H, T, N), (H, N, N)
    return [torch.randn(shape, dtype=torch.float64).div(4).to(dtype) for shape in shapes]


def loops(
    u: Tensor, x: Tensor, taps: Tensor, inward: Tensor, outward: Tensor, onward: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk and lag by lag."""
    L = u.shape[1]
    count = max(1, -(-L // T))
    rows = torch.cat([u, u.new_zeros(u.shape[0], count * T - L, u.shape[2])], 1)
    chunks: list[Tensor] = [rows] * count
    last = x
    for c in reversed(range(count)) if reverse else range(count):
        U = rows[:, c * T : (c + 1) * T]
        outputs = []
        for j in range(T):
            inputs = range(j, T) if reverse else range(j + 1)
            y = torch.stack([taps[:, T - 1 + j - i] * U[:, i] for i in inputs]).sum(0)
            outputs.append(y + torch.einsum("hbn,hn->bh", x, outward[:, j]))
        chunks[c] = torch.stack(outputs, 1)
        x = torch.einsum("bth,htn->hbn", U, inward) + torch.einsum("hbn,hnm->hbm", x, onward)
        last = x if reverse or (c + 1) * T <= L else last
    return torch.cat(chunks, 1)[:, :L], last


def check(tensors: list[Tensor], grad_y: Tensor, reverse: bool, tolerance: float) -> None:
    """Values and all gradients, where no tap looks against the direction."""
    tensors[2] = tensors[2].clone()
    tensors[2][:, T:] *= not reverse
    tensors[2][:, : T - 1] *= reverse
    leaves = [t.detach().double().clone().requires_grad_() for t in tensors]
    want = loops(*leaves, reverse)
    grad_last = torch.randn(want[1].shape, dtype=torch.float64)
    sent = grad_y.double(), grad_last
    wanted = torch.autograd.grad(want, leaves, sent, materialize_grads=True)
    got = scan.operator(*tensors, reverse, tensors[0].dtype, "cpu")
    assert got[0].is_contiguous()
    found = scan.operator_backward(
        [grad_y, grad_last.to(grad_y.dtype)], tensors, reverse, grad_y.dtype, "cpu"
    )
    for g, w in zip((*got, *found), (*want, *wanted), strict=True):
        assert g.shape == w.shape
        close(g, w, tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("H", [1, 5, 16, 35])
@pytest.mark.usefixtures("level", "unchecked")
def test_any_number_of_channels_and_steps(H: int, dtype: torch.dtype, reverse: bool) -> None:
    """Whole vectors of channels and of steps, and what remains of them."""
    for L in (0, 1, T, 3 * T, 4 * T + 3, 37):
        tensors = operands(L, H, dtype)
        check(tensors, torch.randn(B, L, H, dtype=dtype), reverse, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("H", [3, 17])
@pytest.mark.usefixtures("level", "unchecked")
def test_sequences_may_lie_in_any_way(H: int, layout: str) -> None:
    tensors = operands(37, H, torch.float64)
    grad_y = LAYOUTS[layout](torch.randn(B, 37, H, dtype=torch.float64))
    tensors[0] = LAYOUTS[layout](tensors[0])
    check(tensors, grad_y, False, 1e-12)


@pytest.mark.usefixtures("threads", "unchecked")
def test_on_threads() -> None:
    for H in (2, 13, 50):
        check(operands(29, H, torch.float64), torch.randn(B, 29, H, dtype=torch.float64), False, 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.usefixtures("unchecked")
def test_more_sequences_than_are_taken_at_once(reverse: bool) -> None:
    """So that blocks of chunks follow each other, with states in between."""
    tensors = operands(37, 3, torch.float64, B=100)
    check(tensors, torch.randn(100, 37, 3, dtype=torch.float64), reverse, 1e-11)


@pytest.mark.usefixtures("level")
def test_no_sequences() -> None:
    tensors = operands(5, 3, torch.float64)
    tensors[0], tensors[1] = tensors[0][:0], tensors[1][:, :0]
    y, last = scan.operator(*tensors, False, torch.float64, "cpu")
    assert (y.shape, last.shape) == ((0, 5, 3), (3, 0, N))
    found = scan.operator_backward([y, last], tensors, False, torch.float64, "cpu")
    assert all((g == 0).all() for g in found)
