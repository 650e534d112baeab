"""How near to the original are its converted weights? Beside the original repository itself.

    pip install -e ".[test]"
    python benchmarks/convert.py --official DIR [--out FILE.json]

DIR is a checkout of github.com/state-spaces/s4. Its layers, after some steps of training, are converted by
s4.convert: kernels, outputs, and the state and outputs of chunks and of steps, in float64 and float32; in
float32 the original is compared with its own float64, too. Then whole models as its example.py and,
where hydra and omegaconf are installed, its train.py have them. Prints tables of the largest errors as
fractions of the largest value, and writes them with machine, versions and commit.
"""

import json
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness import folder, provenance, result_file, run, show
from torch import Tensor, nn

from s4 import S4Layer, convert

H, L, STEPS = 8, 256, 5
COLUMNS = ("kernel", "output", "state", "output after it", "steps")
_DPLR: dict[str, Any] = {"mode": "dplr"}
_DIAG: dict[str, Any] = {"mode": "diag"}
LAYERS: dict[str, dict[str, Any]] = {
    "legs": _DPLR,
    "legs, n_ssm 1": {**_DPLR, "n_ssm": 1},
    "legs, n_ssm 2": {**_DPLR, "n_ssm": 2},
    "legs, rank 2": {**_DPLR, "rank": 2},
    "legt, rank 2": {**_DPLR, "init": "legt", "rank": 2},
    "legt, rank 3, n_ssm 4": {**_DPLR, "init": "legt", "rank": 3, "n_ssm": 4},
    "fout": {**_DPLR, "init": "fout"},
    "fourier, n_ssm 1": {**_DPLR, "init": "fourier", "n_ssm": 1},
    "hippo (legs, fourier)": {**_DPLR, "init": "hippo"},
    "all": {**_DPLR, "init": "all", "n_ssm": 4},
    "dplr-lin": {**_DPLR, "init": "dplr-lin", "P_scale": 0.1},
    "diag-lin in dplr": {**_DPLR, "init": "diag-lin"},
    "legs, both ways": {**_DPLR, "bidirectional": True},
    "legt, both ways, n_ssm 2": {**_DPLR, "init": "legt", "rank": 2, "bidirectional": True, "n_ssm": 2},
    "legs, softplus": {**_DPLR, "dt_transform": "softplus"},
    "legs, softplus real, exp imag": {**_DPLR, "real_transform": "softplus", "imag_transform": "exp"},
    "legs, relu real": {**_DPLR, "real_transform": "relu"},
    "legs, dt by mode": {**_DPLR, "dt_tie": False},
    "hippo, dt by mode, n_ssm 2": {**_DPLR, "init": "hippo", "dt_tie": False, "n_ssm": 2},
    "legs, l_max": {**_DPLR, "l_max": L},
    "legs, l_max, not set up": {**_DPLR, "l_max": L, "steps": 0},
    "legs, not set up": {**_DPLR, "steps": 0},
    "legs, doubled": {**_DPLR, "first": L // 2},
    "legs, doubled twice": {**_DPLR, "first": L // 4},
    "diag-lin": {**_DIAG, "init": "diag-lin"},
    "diag-lin, bilinear": {**_DIAG, "init": "diag-lin", "disc": "bilinear"},
    "diag-inv, n_ssm 1": {**_DIAG, "init": "diag-inv", "n_ssm": 1},
    "diag-inv, n_ssm 2, bilinear": {**_DIAG, "init": "diag-inv", "n_ssm": 2, "disc": "bilinear"},
    "diag-legs": {**_DIAG, "init": "diag-legs"},
    "diag (inv, lin), n_ssm 4": {**_DIAG, "init": "diag", "n_ssm": 4},
    "diag-lin, both ways": {**_DIAG, "init": "diag-lin", "bidirectional": True},
    "diag-lin, exp imag, relu real": {
        **_DIAG, "init": "diag-lin", "imag_transform": "exp", "real_transform": "relu",
    },
    "diag-inv, sigmoid real": {**_DIAG, "init": "diag-inv", "real_transform": "sigmoid"},
    "diag-lin, dt by mode": {**_DIAG, "init": "diag-lin", "dt_tie": False},
    "diag-lin, dt by mode, bilinear": {**_DIAG, "init": "diag-lin", "dt_tie": False, "disc": "bilinear"},
    "diag-real, is_real": {**_DIAG, "init": "diag-real", "is_real": True},
    "diag-real, is_real, bilinear": {
        **_DIAG, "init": "diag-real", "is_real": True, "disc": "bilinear", "d_state": 8,
    },
}  # fmt: skip


def in_float64(module: nn.Module) -> nn.Module:
    """With nothing kept from float32."""
    for each in module.modules():
        for name in ("omega", "z"):
            each.__dict__.pop(name, None)
    return module.double().eval()


def apart(value: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest value."""
    assert value.shape == truth.shape
    return float((value.double() - truth.double()).abs().max() / truth.abs().max())


def trained(module: nn.Module, u: Tensor, steps: int) -> nn.Module:
    """Some steps towards noise, by which all parameters move."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(steps):
        y = module(u)
        y = y[0] if isinstance(y, tuple) else y
        (y - torch.randn_like(y)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


def converted(module: nn.Module, options: dict[str, Any]) -> S4Layer:
    """With what a state dict does not tell."""
    told = {name: value for name, value in options.items() if name.endswith("_transform")}
    if "disc" in options:
        told["discretization"] = options["disc"]
    return convert.layer(module.state_dict(), **told).eval()


def of_layer(models: ModuleType, options: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The errors of one layer in float64, in float32, and of the original in float32."""
    options = dict(options)
    steps, first = options.pop("steps", STEPS), options.pop("first", L)
    arguments = {"backend": "naive", "verbose": False, "activation": None, "transposed": False, **options}
    layer = models.FFTConv(H, **arguments)
    layer = trained(layer, torch.randn(2, first, H), steps)
    if first < L:
        with torch.no_grad():
            layer(torch.randn(1, L, H))
    narrow = converted(layer, options)
    copy = models.FFTConv(H, **arguments)
    copy.load_state_dict(layer.state_dict())
    exact, theirs = converted(copy.double(), options), in_float64(copy)
    u = torch.randn(2, L, H, dtype=torch.float64)
    both = options.get("bidirectional", False)
    # Its state of real systems is complex, and that of DPLR with a dt for each mode has another scale.
    stateless = (
        both or options.get("is_real") or (options["mode"] == "dplr" and not options.get("dt_tie", True))
    )
    with torch.no_grad():
        truth, y = theirs.kernel(L=L)[0], theirs(u)[0]
        found: dict[str, dict[str, float]] = {}
        for kind, ours, given in (("float64", exact, u), ("float32", narrow, u.float())):
            kernel = ours.kernel(L)
            found[kind] = {
                "kernel": apart(kernel if both else kernel[None], truth),
                "output": apart(ours(given), y),
            }
        if not stateless:
            for kind, errors in states(theirs, {"float64": exact, "float32": narrow}, u).items():
                found[kind] |= errors
        own = {"kernel": layer.eval().kernel(L=L)[0], "output": layer(u.float())[0]}
        found["original in float32"] = {
            "kernel": apart(own["kernel"], truth),
            "output": apart(own["output"], y),
        }
    return found


def states(theirs: Any, layers: dict[str, S4Layer], u: Tensor) -> dict[str, dict[str, float]]:
    """A chunk from a random state, and steps from none."""
    kernel, n = theirs.kernel, next(iter(layers.values())).d_state // 2
    z = torch.randn(len(u), H, n, dtype=torch.complex128)
    given = kernel.default_state(len(u))
    given[..., :n] = z
    if given.shape[-1] == 2 * n:
        given[..., n:] = z.conj()
    after = kernel.forward_state(u.mT.to(torch.complex128), given)[..., :n]
    k, rest = kernel(L=L, state=given)
    y = torch.fft.irfft(torch.fft.rfft(u.mT, 2 * L) * torch.fft.rfft(k[0], 2 * L), 2 * L)[..., :L].mT
    y = y + rest[:, 0].mT + u * theirs.D[0]
    theirs.setup_step()
    one, steps = theirs.default_state(len(u)), []
    for t in range(L):
        y_t, one = theirs.step(u[:, t], one)
        steps.append(y_t)
    found = {}
    for kind, layer in layers.items():
        own, state, stepped = u.to(layer.D.dtype), layer.initial_state(len(u)), []
        for t in range(L):
            z_t, state = layer.step(own[:, t], state)
            stepped.append(z_t)
        ours, last = layer(own, torch.cat([z.real, z.imag], -1).to(own.dtype), return_state=True)
        found[kind] = {
            "state": apart(last, torch.cat([after.real, after.imag], -1)),
            "output after it": apart(ours, y),
            "steps": apart(torch.stack(stepped), torch.stack(steps)),
        }
    return found


class Example(nn.Module):
    """A model of the form of the original's example.py, around its layers."""

    def __init__(self, make: Callable[[], nn.Module], prenorm: bool) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.encoder, self.decoder = nn.Linear(3, H), nn.Linear(H, 10)
        self.s4_layers = nn.ModuleList([make() for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(H) for _ in range(3)])

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, 3) to logits (B, 10)."""
        x = self.encoder(u)
        for layer, norm in zip(self.s4_layers, self.norms, strict=True):
            x = x + layer(norm(x))[0] if self.prenorm else norm(x + layer(x)[0])
        return self.decoder(x.mean(1))


def of_models(
    models: ModuleType, minimal: ModuleType, backbone: ModuleType | None
) -> dict[str, dict[str, float]]:
    """The errors of logits of whole models, in float64 and float32, and the original's own in float32."""
    found = {}
    for prenorm in (False, True):
        for name, make in (
            ("S4Block", lambda: models.S4Block(H, transposed=False, backend="naive", verbose=False)),
            ("S4D", lambda: minimal.S4D(H, transposed=False)),
        ):
            where = f"example.py, {name}, {'pre' if prenorm else 'post'}-norm"
            found[where] = of_model(Example(make, prenorm), torch.randn(2, L, 3), prenorm=prenorm)
        if backbone is not None:
            for norm in ("layer", "batch"):
                where = f"train.py, S4 and FFN, {norm} norm, {'pre' if prenorm else 'post'}-norm"
                model = Trained(backbone, prenorm, norm)
                found[where] = of_model(model, torch.randn(2, L, 3), pooling="mean", dt_transform="softplus")
    return found


class Trained(nn.Module):
    """A model of the form of the original's train.py, around its SequenceModel."""

    def __init__(self, backbone: ModuleType, prenorm: bool, norm: str) -> None:
        super().__init__()
        s4 = {
            "_name_": "s4",
            "mode": "nplr",
            "dt_transform": "softplus",
            "n_ssm": 1,
            "lr": 1e-3,
            "backend": "naive",
        }
        layers = [{**s4, "verbose": False}, {"_name_": "ffn", "expand": 2}]
        self.encoder = nn.Sequential(nn.Linear(3, H))
        self.model = backbone.SequenceModel(
            H,
            2,
            prenorm=prenorm,
            layer=layers,
            residual="R",
            norm=norm,
            pool=None,
            dropout=0.1,
            track_norms=False,
        )
        self.decoder = nn.Sequential(nn.Module())
        self.decoder[0].output_transform = nn.Linear(H, 10)

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, 3) to logits (B, 10)."""
        x, _ = self.model(self.encoder(u))
        return self.decoder[0].output_transform(x.mean(1))


def of_model(model: nn.Module, u: Tensor, **options: Any) -> dict[str, float]:
    """Converted from what the model trained to."""
    model = trained(model, u, STEPS).eval()
    with torch.no_grad():
        ours = convert.model(model.state_dict(), **options).eval()(u)
        theirs = model(u)
        exact = convert.model(in_float64(model).state_dict(), **options).eval()
        truth = model(u.double())
        return {
            "float64": apart(exact(u.double()), truth),
            "float32": apart(ours, truth),
            "original in float32": apart(theirs, truth),
        }


def main(official: Path | None = None, out: Path | None = None, replace: bool = False) -> None:
    """Measure the largest errors of converted weights.

    Args:
        official: a checkout of the original S4 repository.
        out: file of results; without it ~/.cache/s4/benchmarks/convert-cpu.json.
        replace: write over a committed result.
    """
    if folder("--official", official) is None or official is None:
        raise SystemExit("--official: give a checkout of github.com/state-spaces/s4, to compare with")
    if not (official / "models" / "s4" / "s4.py").is_file():
        raise SystemExit(f"--official: no models/s4/s4.py in {official}: give a checkout of the original")
    file = result_file("convert", "cpu", out, replace)
    sys.path.insert(0, str(official))
    logging.disable(logging.WARNING)
    try:
        models, minimal = import_module("models.s4.s4"), import_module("models.s4.s4d")
    except ImportError as error:
        raise SystemExit(f"--official: {official} needs what is not installed here: {error}") from error
    try:
        backbone = import_module("src.models.sequence.backbones.model")
    except ImportError:
        backbone = None
    torch.manual_seed(0)
    layers = {name: of_layer(models, options) for name, options in LAYERS.items()}
    for kind in ("float64", "float32"):
        own = ("original's kernel", "its output") if kind == "float32" else ()
        rows = []
        for name, row in layers.items():
            errors = [row[kind].get(c) for c in COLUMNS]
            errors += list(row["original in float32"].values()) if own else []
            rows.append([name, *("" if e is None else f"{e:.0e}" for e in errors)])
        title = f"errors of converted layers in {kind}, N = 64, L = {L}, {STEPS} steps trained"
        show(("layer", *COLUMNS, *own), rows, title)
    whole = of_models(models, minimal, backbone)
    kinds = ("float64", "float32", "original in float32")
    show(("logits of", *kinds), [[name, *(f"{row[k]:.0e}" for k in kinds)] for name, row in whole.items()])
    result = {**provenance(torch.device("cpu")), "layers": layers, "models": whole}
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"results: {file}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
