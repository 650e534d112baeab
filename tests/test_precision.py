"""Products keep all digits of their dtype; what decayed is dropped, but not its gradient."""

from collections.abc import Iterator

import oracle
import pytest
import torch

from s4 import S4Layer
from s4.precision import add_product, product, without_denormals


@pytest.fixture(params=["high", "medium"])
def allowed(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a user may allow for float32 products of their own."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.usefixtures("allowed")
def test_products_have_all_digits_whatever_is_allowed(dtype: torch.dtype) -> None:
    """The double product, rounded once, which no product in float32 or less is."""
    wider = torch.float64 if dtype == torch.float32 else torch.complex128
    A, B, C = (torch.randn(3, 40, 40, dtype=dtype) for _ in range(3))
    want = (A.to(wider) @ B.to(wider)).to(dtype)
    assert torch.equal(product(A, B), want)
    assert torch.equal(add_product(C, A, B), C + want)
    assert not torch.equal(torch.bmm(A, B), want)


def test_products_are_torchs_own_otherwise() -> None:
    A, B, C = (torch.randn(3, 40, 40) for _ in range(3))
    assert torch.equal(product(A, B), A @ B)
    assert torch.equal(add_product(C, A, B), torch.baddbmm(C, A, B))


@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.usefixtures("allowed")
def test_a_layer_keeps_its_digits(mode: str) -> None:
    layer = S4Layer(4, 16, mode=mode, backend="torch")
    u = torch.randn(2, 300, 4)
    wide = S4Layer(**{**layer.config(), "dtype": "float64"})
    wide.load_state_dict(layer.state_dict())
    oracle.close(layer(u), wide(u.double()), 1e-5)


def test_what_decayed_is_dropped_and_keeps_its_gradient() -> None:
    t = torch.tensor([1.0, 1e-31, -1e-40, 0.0, torch.inf, torch.nan], requires_grad=True)
    kept = without_denormals(t)
    want = torch.tensor([1.0, 0.0, 0.0, 0.0, torch.inf, torch.nan])
    torch.testing.assert_close(kept.detach(), want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.autograd.grad(kept.sum(), t)[0], torch.ones(6))
