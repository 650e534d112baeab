"""Train a small causal denoiser and write it as ONNX: python examples/streaming/denoiser.py [--options]."""

from pathlib import Path

import onnx
import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track
from sounds import RATE, noisy, tones
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model, param_groups
from s4.deploy import export


class Denoiser(S4Model):
    """Audio (B, L, 1) to audio: two blocks of S4D, each with a memory of up to a sixteenth of a second."""

    def __init__(self, d_model: int) -> None:
        blocks = [S4Block(S4Layer(d_model, 32, variant="diag", dt_max=0.5)) for _ in range(2)]
        super().__init__(nn.Linear(1, d_model), blocks, nn.Linear(d_model, 1), norm=nn.LayerNorm(d_model))


def batch(size: int, seconds: float, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy and clean sounds (size, samples, 1)."""
    clean = [tones(seconds, size * seed + i) for i in range(size)]
    pairs = [(noisy(sound, size * seed + i), sound) for i, sound in enumerate(clean)]
    given, wanted = zip(*pairs, strict=True)
    return torch.tensor(given)[..., None], torch.tensor(wanted)[..., None]


def decibels(wanted: Tensor, got: Tensor) -> float:
    """The ratio of signal to noise."""
    return 10 * float(torch.log10(wanted.square().mean() / (got - wanted).square().mean()))


def main(
    out: Path = Path("denoiser.onnx"),
    steps: PositiveInt = 150,
    d_model: PositiveInt = 32,
    chunk: PositiveInt = 160,
    seconds: PositiveFloat = 0.5,
    batch_size: PositiveInt = 8,
    seed: int = 0,
) -> None:
    """Train a denoiser of audio at 16 kHz on tones in noise, and write what streams it.

    Args:
        out: the file, .onnx.
        steps: of the optimiser.
        d_model: channels.
        chunk: samples that the file takes at a time; the sound comes out so much later.
        seconds: of a training example.
        batch_size: examples in a step.
        seed: of weights and sounds.
    """
    if out.suffix != ".onnx":
        raise SystemExit(f"--out: the name must end in .onnx, got {out}")
    if not out.absolute().parent.is_dir():
        raise SystemExit(f"--out: there is no folder {out.parent}")
    torch.manual_seed(seed)
    model = Denoiser(d_model)
    optimizer = torch.optim.AdamW(param_groups(model, lr=4e-3, ssm_lr=4e-3, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], steps
    )
    for step in track(range(steps), "training", console=Console(stderr=True)):
        given, wanted = batch(batch_size, seconds, seed + step + 1)
        loss = (model(given) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        given, wanted = batch(8, 1.0, 10**6)
        before, after = decibels(wanted, given), decibels(wanted, model(given))
    Console().print(f"signal to noise: {before:.1f} dB, denoised {after:.1f} dB")
    export(model, out, "chunk", chunk=chunk)
    file = onnx.load(out)
    onnx.helper.set_model_props(file, {"sample_rate": str(RATE)})
    onnx.save(file, out)
    Console().print(f"wrote {out}; now: python examples/streaming/stream.py {out}", soft_wrap=True)


if __name__ == "__main__":
    auto_cli(main)
