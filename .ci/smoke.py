"""What an installed s4 has to do, without its repository: python .ci/smoke.py, from any folder."""

import argparse
from pathlib import Path

import torch

import s4
import s4.kernel
from s4.backends import cpu


def main() -> None:
    """Exit with status 1 if something is missing or wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="expect a wheel without the C++ libraries")
    plain = parser.parse_args().plain
    folder = Path(s4.__file__).parent
    assert folder != Path(__file__).resolve().parents[1] / "s4", (
        f"{folder} is the tree, not what was installed"
    )
    for name in ("py.typed", "backends/cuda/kernels.cu"):
        assert (folder / name).is_file(), f"{folder} has no {name}"
    sources = [*folder.rglob("*.cpp"), *folder.rglob("*.h"), *folder.rglob("*.map")]
    assert not sources, f"sources were installed: {sources}"
    built = cpu.levels()
    assert bool(built) != plain, f"libraries that run here: {built}; {cpu.level()}"
    for backend in ["torch", *([] if plain else ["cpu"])]:
        for variant in ("dplr", "diag"):
            _same(s4.S4Layer(8, 16, variant=variant, backend=backend))
    print(f"s4 {s4.__version__} works, torch {torch.__version__}, libraries: {', '.join(built) or 'none'}")


def _same(layer: s4.S4Layer) -> None:
    """Every way through a layer gives the same, and gradients are numbers."""
    u = torch.randn(2, 200, 8)
    with torch.no_grad():
        state, outputs = layer.initial_state(2), []
        for t in range(200):
            y, state = layer.step(u[:, t], state)
            outputs.append(y)
        want = torch.stack(outputs, 1)
    irregular = layer(u, rate=torch.ones(2, 200))
    for mode in ("fft", "scan"):
        layer.mode = mode
        for got in (layer(u), irregular):
            error = float((got - want).detach().abs().max() / want.abs().max())
            assert error < 1e-4, f"{layer.variant} by {layer.backend}: {mode} and step differ by {error:.1e}"
    (layer(u).square().sum() + irregular.square().sum()).backward()
    for name, parameter in layer.named_parameters():
        gradient = torch.tensor(torch.nan) if parameter.grad is None else parameter.grad
        assert bool(gradient.isfinite().all()), f"the gradient of {name} is {gradient}"


if __name__ == "__main__":
    main()
