"""What torch's flop counter says of a layer, against counts made by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import s4.kernel
from s4 import S4Layer
from s4.ops.chunks import chunk_length

H, N, B, L, T = 4, 16, 2, 96, 8
fused = pytest.mark.skipif(isinstance(s4.kernel.backends()["cpu"], str), reason="C++ extension is not built")


def counted(layer: S4Layer, backward: bool) -> dict[str, int]:
    u = torch.randn(B, L, H)
    with FlopCounterMode(display=False) as counter:
        y = layer(u)
        if backward:
            y.sum().backward()
    return {str(name).removeprefix("s4."): n for name, n in counter.get_flop_counts()["Global"].items()}


@fused
def test_a_scan_is_counted() -> None:
    """Of a chunk 2 T^2 + 4 T N + 2 N^2; of its maps two orbits, the taps and A^T."""
    layer = S4Layer(H, N, variant="diag", mode="scan").requires_grad_(False)
    assert chunk_length(B, L, N, price=1) == T
    assert counted(layer, backward=False) == {
        "scan": B * H * L // T * (2 * T**2 + 4 * T * N + 2 * N**2),
        "maps": H * (2 * T * 3 * N + 2 * T * N + 3 * N),
    }


@fused
@pytest.mark.parametrize("variant", ["dplr", "diag"])
@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_backward_is_counted(mode: str, variant: str) -> None:
    layer = S4Layer(H, N, variant=variant, mode=mode)
    found = counted(layer, backward=True)
    for name in ("maps", "scan") if mode == "scan" else ("response",):
        assert 2 * found[name] <= found[f"{name}_backward"] <= 4 * found[name]


@fused
def test_what_is_left_of_a_last_chunk_is_counted() -> None:
    """The map past it, made with the others of that many steps; backward three times as much."""
    layer = S4Layer(H, N, variant="diag", mode="scan")
    with FlopCounterMode(display=False) as counter:
        _, state = layer(torch.randn(B, L + 3, H), return_state=True)
        state.sum().backward()
    found = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    assert found["s4.power"] == H * (2 * 3 * 3 * N + 2 * 3 * N + 3 * N)
    assert found["s4.power_backward"] == 3 * found["s4.power"]


def test_sums_and_steps_are_counted() -> None:
    layer = S4Layer(H, N).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer.step(torch.randn(B, H), layer.initial_state(B))
    if not isinstance(s4.kernel.backends()["cpu"], str):
        counts = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
        assert counts["s4.step"] == B * H * (3 * N + 4 * N + 4 * N + 2)
    with FlopCounterMode(display=False) as counter:
        layer.kernel(60, method="sums").sum().backward()
    sums = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    nodes = 60 // 2 + 1
    assert sums["s4.cauchy"] == H * N // 2 * nodes * 2 * (11 + 8 * 4)
    assert sums["s4.cauchy_backward"] == 2 * sums["s4.cauchy"]


def test_states_are_counted() -> None:
    """Of a chunk 2 T N + 2 N^2, of a position 2 T N; backward some three times as much."""
    layer, P = S4Layer(H, N, variant="diag"), 5
    with FlopCounterMode(display=False) as counter:
        layer.states(torch.randn(B, L, H), torch.zeros(B, P, dtype=torch.long)).sum().backward()
    found = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    assert found["s4.states"] % (B * H * 2 * N) == 0
    assert 2 * found["s4.states"] <= found["s4.states_backward"] <= 4 * found["s4.states"]
