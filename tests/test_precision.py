"""Products keep all digits of their dtype; what decayed is dropped, but not its gradient."""

from collections.abc import Iterator

import oracle
import pytest
import torch

from s4 import S4Layer
from s4.precision import add_product, product


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
