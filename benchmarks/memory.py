"""What does a layer remember, and for how long? By initialisation, dt, state size and number of systems.

    pip install -e ".[test]"
    python benchmarks/memory.py [--quick true] [--out FILE.json]

`recall` and `reach` are computed, not trained: how much of the input of some steps ago the best linear
readout of a fresh layer's state still tells. `delay` trains: a block is to say again what it heard. Prints
tables, and writes them with machine, versions and commit.
"""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from harness import provenance, result_file, run, show
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from s4 import S4Block, S4Layer, S4Model, hippo, param_groups

INITS = [(variant, init) for variant in ("dplr", "diag") for init in hippo.names(variant)]
BANDWIDTH = 0.02  # of the input, in cycles a step
NOISE = 0.01  # of what is read from the state, over the root mean square of each of its numbers
DT = 1e-3  # of `recall`, where N = 64
LAGS = [0, 10, 30, 100, 200, 300, 500, 700, 900, 1000, 1100, 1300, 1600, 2000, 3000]
LAG, LENGTH, HIGHEST = 200, 1000, 0.05  # of the task that is trained: lag, steps, cycles a step


def told(variant: str, init: str, N: int, dt: float, lags: Tensor) -> Tensor:
    """R2 of the best linear readout of u[t - lag] from the state after u[t], for each of the lags.

    Of an endless stationary input of mean 0 with all frequencies up to BANDWIDTH, all as strong. With
    the frequency response X(w) = (I - A e^-iw)^-1 B, the covariance of the state is the mean of X X*, and its
    covariance with an earlier input the mean of X e^(iw lag). What is read has NOISE: no readout is exact.
    """
    layer = S4Layer(1, N, variant=variant, init=init, dt_min=dt, dt_max=dt, dtype=torch.float64)
    with torch.no_grad():
        A, B = (part[0].to(torch.complex128) for part in layer.dense()[:2])
    count = 4000
    w = 2 * math.pi * BANDWIDTH * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    X = torch.cat([_response(A, B, part) for part in w.split(500)])
    covariance = (X.mT @ X.conj()).real / count
    scale = covariance.diagonal().sqrt()
    scale = torch.where(scale > 1e-9 * scale.max(), scale, math.inf)  # a sine of frequency 0 is never driven
    covariance = covariance / scale / scale[:, None] + NOISE**2 * torch.eye(N, dtype=torch.float64)
    phase = torch.exp(1j * w * lags[:, None])
    cross = (phase @ X).real / count / scale
    return (cross * torch.linalg.solve(covariance, cross.mT).mT).sum(-1)


def _response(A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    """(frequencies, N): (I - A e^-iw)^-1 B."""
    system = torch.eye(len(B), dtype=A.dtype) - A * torch.exp(-1j * w)[:, None, None]
    return torch.linalg.solve(system, B.expand(len(w), -1)[..., None])[..., 0]


def reach(variant: str, init: str, N: int, dt: float) -> int:
    """The lag in steps from which less than half of the input's variance is told."""
    lags = torch.unique(torch.logspace(0, 5, 1500).long()).to(torch.float64)
    forgotten = told(variant, init, N, dt, lags) < 0.5
    return int(lags[forgotten.int().argmax()]) if forgotten.any() else int(lags[-1])


def signals(count: int, seed: int) -> Tensor:
    """(count, LENGTH, 1) noise with all frequencies up to HIGHEST and variance 1."""
    noise = torch.randn(count, LENGTH, generator=torch.Generator().manual_seed(seed))
    spectrum = torch.fft.rfft(noise)
    spectrum[:, torch.fft.rfftfreq(LENGTH) > HIGHEST] = 0
    signal = torch.fft.irfft(spectrum, LENGTH)
    return (signal / signal.std())[..., None]


def delay(layer: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """Train a block of 16 channels to say again what it heard LAG steps ago; R2 on 50 new signals."""
    torch.manual_seed(seed)
    block = S4Block(S4Layer(16, **layer))
    model = S4Model(nn.Linear(1, 16), [block], nn.Linear(16, 1), norm=nn.LayerNorm(16))
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    train, test, begun = signals(400, 0), signals(50, 1), time.perf_counter()
    for _ in range(steps):
        u = train[torch.randint(len(train), (8,))]
        loss = F.mse_loss(model(u)[:, LAG:], u[:, :-LAG])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        target = test[:, :-LAG]
        r2 = 1 - float(F.mse_loss(model(test)[:, LAG:], target) / target.var())
    return {**layer, "seed": seed, "steps": steps, "r2": r2, "seconds": seconds}


def _layers() -> list[dict[str, Any]]:
    """Which layers are trained: each initialisation with two ranges of dt, then sizes, ranges and systems."""
    window = {"dt_min": 1 / 256, "dt_max": 1 / 256}
    found: list[dict[str, Any]] = []
    for variant, init in INITS:
        kind = {"variant": variant, "init": init, "d_state": 64, "n_ssm": 1}
        found += [{**kind, "dt_min": 1e-3, "dt_max": 1e-1}, {**kind, **window}]
    legs = {"variant": "dplr", "init": "legs", "n_ssm": 1, "dt_min": 1e-3, "dt_max": 1e-1}
    found += [{**legs, "d_state": N} for N in (4, 16, 256)]
    found += [{**legs, "d_state": 64, "dt_min": dt, "dt_max": dt} for dt in (1e-1, 1e-2, 1e-3)]
    found += [{**legs, "d_state": 64, "n_ssm": 16}]
    return found


def main(quick: bool = False, threads: int = 1, out: Path | None = None, replace: bool = False) -> None:
    """Compute what fresh layers remember, and train layers to remember.

    Args:
        quick: a few lags and steps, to see that it runs.
        threads: of torch.
        out: file of results; without it ~/.cache/s4/benchmarks/memory-cpu.json.
        replace: write over a committed result.
    """
    file = result_file("memory", "cpu", out, replace)
    torch.set_num_threads(threads)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    machine, lags = provenance(torch.device("cpu")), torch.tensor(LAGS, dtype=torch.float64)
    sizes, steps, seeds = ((16,), 3, (0,)) if quick else ((16, 64, 256), 400, (0, 1, 2))
    recall = [
        {"variant": variant, "init": init, "r2": told(variant, init, 64, DT, lags).tolist()}
        for variant, init in INITS
    ]
    reaches = [
        {"variant": "dplr", "init": init, "N": N, "dt": dt, "steps": reach("dplr", init, N, dt)}
        for init, N, dt in itertools.product(("legs", "legt"), sizes, (1e-1, 1e-2, 1e-3, 1e-4))
    ]
    result = {
        **machine,
        "bandwidth": BANDWIDTH,
        "noise": NOISE,
        "dt": DT,
        "lags": LAGS,
        "recall": recall,
        "reach": reaches,
        "task": {"lag": LAG, "length": LENGTH, "bandwidth": HIGHEST},
        "delay": [],
    }
    for layer, seed in itertools.product(_layers()[: 1 if quick else None], seeds):
        errors.print(f"training {layer}, seed {seed}", markup=False)
        result["delay"].append(delay(layer, seed, steps))
        file.write_text(json.dumps(result, indent=1) + "\n")
    told_by_lag = [[f"{row['variant']} {row['init']}", *(f"{x:.2f}" for x in row["r2"])] for row in recall]
    show(["", *map(str, LAGS)], told_by_lag, "R2 by lag")
    show(["init", "N", "dt", "steps"], [list(row.values())[1:] for row in reaches], "half of it told")
    names = ["variant", "init", "d_state", "n_ssm", "dt_min", "dt_max", "seed", "r2", "seconds"]
    show(names, [[row[name] for name in names] for row in result["delay"]], f"the input of {LAG} steps ago")
    errors.print(f"results: {file}", markup=False)


if __name__ == "__main__":
    run(main)
