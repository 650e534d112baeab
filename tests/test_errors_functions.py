"""What the functions of `s4.hippo` and `s4.kernel` refuse, and what they say then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import EITHER, Kind, refuses

import s4.kernel
from s4 import hippo
from s4.ops import convolve as conv

pytestmark = pytest.mark.usefixtures("unchecked")
T1 = torch.ones(2)
HIPPO = {
    "unknown measure": (lambda: hippo.transition("lagt", 4), "measure.*legs.*lagt"),
    "measures": (lambda: hippo.transition(["legs"], 4), r"measure.*\['legs'\]"),
    "inits": (lambda: hippo.diag(["legs"], 4), r"init.*\['legs'\]"),
    "measure of dplr": (lambda: hippo.dplr("lin", 4), "measure.*legs.*lin"),
    "init of diag": (lambda: hippo.diag("legt", 4), "init.*legs.*legt"),
    "odd N": (lambda: hippo.transition("legs", 3), "N .*3"),
    "odd N of dplr": (lambda: hippo.dplr("fout", 5), "N .*5"),
    "odd N of diag": (lambda: hippo.diag("inv", 5), "N .*5"),
    "N zero": (lambda: hippo.transition("legt", 0), "N .*0"),
    "N negative": (lambda: hippo.diag("lin", -2), "N .*-2"),
    "measure of basis": (lambda: hippo.basis("lin", 4, T1), "measure.*legs.*lin"),
    "odd N of basis": (lambda: hippo.basis("legt", 5, T1), "N .*5"),
    "lags a list": (lambda: hippo.basis("legs", 4, [0.5]), "lags .*list"),
    "lags integers": (lambda: hippo.basis("legs", 4, torch.arange(3)), "lags .*int64"),
    "lags negative": (lambda: hippo.basis("legs", 4, -T1), "lags .*at least 0.*-1"),
    "lags nan": (lambda: hippo.basis("legs", 4, T1 * float("nan")), "lags .*nan"),
    "lags beyond legt": (lambda: hippo.basis("legt", 4, 1.5 * T1), r"lags .*0\.\.1.*legt.*1\.5"),
    "lags beyond fout": (lambda: hippo.reconstruct("fout", torch.zeros(4), 2 * T1), r"lags .*0\.\.1.*2"),
    "lags a scalar": (lambda: hippo.reconstruct("legs", torch.zeros(4), T1[0]), "lags .*scalar"),
    "lags of other channels": (
        lambda: hippo.reconstruct("legs", torch.zeros(3, 4), torch.ones(2, 5)),
        r"lags .*\(3, 4\).*\(2, 5\)",
    ),
    "measure of reconstruct": (lambda: hippo.reconstruct("inv", torch.zeros(4), T1), "measure.*legs.*inv"),
    "state complex": (lambda: hippo.reconstruct("legs", torch.zeros(4) + 0j, T1), "state .*complex64"),
    "state odd": (lambda: hippo.reconstruct("legs", torch.zeros(2, 3), T1), r"state .*even.*\(2, 3\)"),
    "state a number": (lambda: hippo.from_modes("legs", 1.0), "state .*float"),
    "state empty": (lambda: hippo.from_modes("legs", torch.zeros(2, 0)), r"state .*\(2, 0\)"),
    "state scalar": (lambda: hippo.from_modes("legs", torch.tensor(1.0)), "state .*even"),
    "measure of modes": (lambda: hippo.from_modes("lin", torch.zeros(4)), "measure.*legs.*lin"),
}


@pytest.mark.parametrize(("call", "match"), HIPPO.values(), ids=HIPPO)
def test_hippo(call: Callable[[], Any], match: str) -> None:
    refuses(EITHER, match, call)


# V (..., n), Z (..., l) and W (..., n) as `cauchy` and `vandermonde` take them
V, Z, W = torch.zeros(3, 2) + 0j, torch.ones(3, 5) + 0j, torch.zeros(3, 2) - 1j
SUMS: dict[str, tuple[Callable[[], Any], Kind, str]] = {
    "cauchy backend": (
        lambda: s4.kernel.cauchy(V, Z, W, backend="magic"),
        ValueError,
        "backend.*torch.*magic",
    ),
    "cauchy no backend": (
        lambda: s4.kernel.cauchy(V, Z, W, backend=None),
        ValueError,
        "backend.*torch.*None",
    ),
    "cauchy backends": (
        lambda: s4.kernel.cauchy(V, Z, W, backend=["torch"]),
        ValueError,
        r"backend.*\['torch'\]",
    ),
    "cauchy of a list": (lambda: s4.kernel.cauchy([1], Z, W), TypeError, "v .*list"),
    "cauchy at a number": (lambda: s4.kernel.cauchy(V, 1j, W), TypeError, "z .*complex"),
    "cauchy real v": (lambda: s4.kernel.cauchy(V.real, Z, W), TypeError, "v .*float32"),
    "cauchy real z": (lambda: s4.kernel.cauchy(V, Z.real, W), TypeError, "z .*float32"),
    "cauchy real w": (lambda: s4.kernel.cauchy(V, Z, W.real), TypeError, "w .*float32"),
    "cauchy dtypes": (lambda: s4.kernel.cauchy(V, Z.to(torch.complex128), W), TypeError, "z.*complex128"),
    "cauchy modes": (lambda: s4.kernel.cauchy(V, Z, W[:, :1]), ValueError, "v and w.*2.*1"),
    "cauchy batches": (lambda: s4.kernel.cauchy(V, Z[:2], W), ValueError, r"z.*\(2, 5\)"),
    "cauchy scalar": (lambda: s4.kernel.cauchy(V, Z[0, 0], W), ValueError, "z"),
    "vandermonde of a list": (lambda: s4.kernel.vandermonde(V, [1], 3), TypeError, "x .*list"),
    "vandermonde of a flag": (lambda: s4.kernel.vandermonde(V, W, True), EITHER, "L .*True"),
    "vandermonde real v": (lambda: s4.kernel.vandermonde(V.real, W, 3), TypeError, "v .*float32"),
    "vandermonde real x": (lambda: s4.kernel.vandermonde(V, W.real, 3), TypeError, "x .*float32"),
    "vandermonde modes": (lambda: s4.kernel.vandermonde(V, W[:, :1], 3), ValueError, "v and x.*2.*1"),
    "vandermonde batches": (lambda: s4.kernel.vandermonde(V, W[:2], 3), ValueError, r"x.*\(2, 2\)"),
    "vandermonde length": (lambda: s4.kernel.vandermonde(V, W, -1), ValueError, "L .*-1"),
    "vandermonde of no machine": (
        lambda: s4.kernel.vandermonde(V, W, 2**62),
        ValueError,
        f"L .*at most.*{2**62}",
    ),
    "vandermonde half a length": (lambda: s4.kernel.vandermonde(V, W, 2.5), TypeError, r"L .*2\.5"),
}


@pytest.mark.parametrize(("call", "kind", "match"), SUMS.values(), ids=SUMS)
def test_sums(call: Callable[[], Any], kind: Kind, match: str) -> None:
    refuses(kind, match, call)


def test_fft_size_of_nothing() -> None:
    for n in (0, 1, 2):
        assert conv.fft_size(n) == 2
