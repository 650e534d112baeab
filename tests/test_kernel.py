"""Convolution kernels from parameters, each way to them, against powers of the dense float64 system."""

import math
from collections.abc import Callable

import oracle
import pytest
import torch

import s4
from s4 import hippo, system
from s4.backends import cpu
from s4.kernel import convolution, diag, dplr
from s4.ops.response import response

INITS = [
    ("dplr", "legs"),
    ("dplr", "legt"),
    ("dplr", "fout"),
    ("diag", "legs"),
    ("diag", "lin"),
    ("diag", "inv"),
]
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-5}


def parameters(
    variant: str, init: str, N: int, dt: list[float], directions: int = 1
) -> dict[str, torch.Tensor]:
    """A layer's parameters at initialisation, with random C, one channel for each dt."""
    H, n = len(dt), N // 2
    Lambda, *P, B = hippo.dplr(init, N) if variant == "dplr" else hippo.diag(init, N)
    values = {
        "log_dt": torch.tensor(dt, dtype=torch.float64).log(),
        "log_A_real": (-Lambda.real).clamp(min=1e-4).log().expand(H, n),
        "A_imag": Lambda.imag.expand(H, n),
        "B": torch.view_as_real(B).expand(H, n, 2),
        "C": torch.randn(directions, H, n, 2, dtype=torch.float64) / math.sqrt(2),
        "D": torch.zeros(H, dtype=torch.float64),
    }
    if P:
        values["P"] = torch.view_as_real(P[0])[:, None].expand(-1, H, n, 2)
    return values


def kernel(way: str, values: dict[str, torch.Tensor], L: int, dtype: torch.dtype) -> torch.Tensor:
    """By "powers", "cauchy BACKEND" for DPLR; "zoh" and "bilinear", with "powers" or "sums", for diagonal."""
    Lambda = torch.complex(-values["log_A_real"].exp(), values["A_imag"])
    B, C = oracle.complex128(values["B"]), oracle.complex128(values["C"])
    P = oracle.complex128(values["P"]) if "P" in values else B.new_zeros(0, *B.shape)
    method = "zoh" if way.startswith("zoh") else "bilinear"
    systems = system.System(Lambda, P, B, C, values["log_dt"].exp(), method)
    name, _, how = way.partition(" ")
    if name == "cauchy":
        return dplr.kernel(systems, L, dtype, how)
    recurrence = system.discretize(systems)
    if "powers" in way:
        return response(recurrence, L, dtype, "torch" if how == "torch" else "auto")[:, 0]
    return diag.kernel(recurrence, L, dtype)


def ways(variant: str, *backends: str) -> list[str]:
    if variant == "dplr":
        return ["powers", "powers torch", *(f"cauchy {b}" for b in backends)]
    return [f"{method} {how}" for method in ("zoh", "bilinear") for how in ("powers", "sums")]


def per_channel(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Each channel and direction against its own largest value, of a true kernel that may go on beyond L."""
    assert got.shape[:2] == want.shape[:2]
    L, scale = got.shape[-1], want.abs().amax(-1, keepdim=True)
    assert bool(((got - want[..., :L]).abs() <= tolerance * scale).all())


@pytest.mark.parametrize("L", [0, 1, 2, 3, 16, 31, 100])
@pytest.mark.parametrize(
    ("init", "way"),
    [(i, w) for i in INITS for w in ways(i[0], "naive", "torch")],
    ids=lambda p: " ".join(p) if isinstance(p, tuple) else p,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_short_kernels(init: tuple[str, str], way: str, L: int, dtype: torch.dtype) -> None:
    for N, directions in ((2, 1), (16, 2), (64, 1)):
        values = parameters(*init, N, [1e-4, 1e-2, 1e-1], directions)
        # The first values alone may cancel, and an alias is a fraction of what comes after them.
        want = oracle.kernel(oracle.discrete(values, "zoh" if "zoh" in way else "bilinear"), max(L, 16))
        got = kernel(way, values, L, dtype)
        assert got.dtype == dtype
        assert got.shape == (directions, 3, L)
        per_channel(got, want, DTYPES[dtype])


LONG = [
    # every init, the contract's largest state, and its longest kernel
    *((init, 64, 1024) for init in INITS),
    *((init, 256, 16384) for init in INITS),
    (("dplr", "legs"), 64, 65536),
    (("dplr", "fout"), 64, 65536),
    (("diag", "inv"), 64, 65536),
]


@pytest.mark.parametrize(
    ("init", "N", "L"), LONG, ids=lambda p: "-".join(p) if isinstance(p, tuple) else str(p)
)
def test_long_kernels(init: tuple[str, str], N: int, L: int) -> None:
    values = parameters(*init, N, [1e-4, 1e-3, 1e-1])
    for method in ("bilinear",) if init[0] == "dplr" else ("zoh", "bilinear"):
        want = oracle.long_kernel(oracle.discrete(values, method), L)
        for way in ways(init[0], "torch"):
            if method in way or init[0] == "dplr":
                for dtype, tolerance in DTYPES.items():
                    per_channel(kernel(way, values, L, dtype), want, tolerance)


@pytest.mark.parametrize("way", ["powers", "cauchy torch", "cauchy naive"])
def test_a_mode_at_the_nyquist_node(way: str) -> None:
    """A fast mode under a long step has Abar near -1, where z = -1 is a node: nothing divides by 1 + z."""
    values = parameters("dplr", "fout", 8, [10.0, 1000.0])
    want = oracle.kernel(oracle.discrete(values, "bilinear"), 50)
    per_channel(kernel(way, values, 50, torch.float64), want, 1e-9)


@pytest.mark.parametrize("way", ["powers", "cauchy torch"])
def test_a_kernel_that_has_not_begun_to_decay(way: str) -> None:
    """Far less than one time constant: what the kernel does after L must not come back as an alias."""
    values = parameters("dplr", "legt", 32, [1e-4])
    values["P"] = values["P"] * 1e-2
    want = oracle.kernel(oracle.discrete(values, "bilinear"), 37)
    for dtype, tolerance in DTYPES.items():
        per_channel(kernel(way, values, 37, dtype), want, tolerance)


@pytest.mark.parametrize(
    ("way", "method"),
    [
        ("powers", "bilinear"),
        ("cauchy torch", "bilinear"),
        ("zoh sums", "zoh"),
        ("bilinear powers", "bilinear"),
        ("bilinear sums", "bilinear"),
    ],
)
def test_gradients_of_every_parameter(way: str, method: str) -> None:
    dense = " " in way and "cauchy" not in way
    start = parameters(*(("diag", "lin") if dense else ("dplr", "legt")), 8, [0.02, 0.2], 2)
    weight = torch.randn(2, 2, 23).double()
    grads = []
    for which in ("library", "oracle"):
        values = {name: value.clone().requires_grad_() for name, value in start.items()}
        K = (
            kernel(way, values, 23, torch.float64)
            if which == "library"
            else oracle.kernel(oracle.discrete(values, method), 23)
        )
        (K * weight).sum().backward()
        grads.append({name: value.grad for name, value in values.items() if name != "D"})
    for name in grads[0]:
        oracle.close(grads[0][name], grads[1][name], 1e-8, name)


@pytest.mark.skipif(isinstance(s4.kernel.backends()["cpu"], str), reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("dtype", "longest"), [(torch.float32, 32), (torch.float64, 8)], ids=["float32", "float64"]
)
def test_auto_takes_sums_for_short_kernels_and_powers_for_long(
    dtype: torch.dtype, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At N = 16 sums serve up to N^2 / 8 nodes: L, or 4 L in float64. Without the extension powers do."""
    taken: list[str] = []
    for module, name in ((dplr, "kernel"), (convolution, "response")):
        way = getattr(module, name)

        def spy(*arguments: object, way: Callable[..., torch.Tensor] = way, name: str = name) -> torch.Tensor:
            taken.append("sums" if name == "kernel" else "powers")
            return way(*arguments)

        monkeypatch.setattr(module, name, spy)
    layer = s4.S4Layer(2, 16, dtype=dtype)
    layer.kernel(longest)
    layer.kernel(longest + 1)
    assert taken == ["sums", "powers"]
    layer.kernel(longest + 1, method="sums")
    layer.kernel(longest, method="powers")
    assert taken[2:] == ["sums", "powers"]
    layer.backend = "torch"
    layer.kernel(longest + 1)
    layer.kernel(longest, method="powers")
    assert taken[4:] == ["sums", "powers"]
    layer.backend = "auto"
    monkeypatch.setattr(cpu, "_library", lambda: "not built")
    layer.kernel(longest)
    assert taken[6:] == ["powers"]


def test_a_row_of_zeros_is_there_to_be_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers next to denormal ones are dropped from products; the gradient of a zero is not among them."""
    for library in (cpu._library, lambda: "not built"):
        monkeypatch.setattr(cpu, "_library", library)
        layer = s4.S4Layer(2, 8)
        with torch.no_grad():
            layer.C.zero_()
        layer.kernel(3000).sum().backward()
        assert layer.C.grad is not None
        assert bool(layer.C.grad.any())
