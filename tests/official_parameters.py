"""Parameters as the original repository stores them, with what it computes of them.

    python tests/official_parameters.py

writes tests/golden/official/*.safetensors: "parameters/..." in float32, an input "u", and in float64 what
comes of them: "y", and of a layer its "kernel" and, if causal, the "state" after the input. The metadata has
the function of `s4.convert` and its arguments.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from official_dense import INVERSE, Array, Arrays, gelu, inner, linear, mixed, norm, residual, run, systems
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "golden" / "official"
H, N, L, BATCH = 4, 4, 20, 2  # channels, modes, length

# Parameters, near what training starts from


def dplr(draw: Callable[..., Array], S: int = H, rank: int = 1, length: int = 0, **more: Any) -> Arrays:
    return {
        **diagonal(draw, S, **more),
        "kernel.P": 0.5 * draw(rank, S, N, 2),
        "kernel.l_kernel": np.array(length),
    }


def diagonal(
    draw: Callable[..., Array], S: int = H, both_ways: bool = False, per_mode: bool = False, **transforms: str
) -> Arrays:
    dt = np.exp(-2.5 + 0.5 * draw(H, N if per_mode else 1))
    real = 0.5 * np.exp(0.3 * draw(S, N))
    imag = np.pi * (np.arange(N) + 0.2) * np.exp(0.1 * draw(S, N))
    return {
        "D": draw(1, H),
        "kernel.inv_dt": INVERSE[transforms.get("dt", "exp")](dt),
        "kernel.A_real": INVERSE[transforms.get("real", "exp")](np.minimum(real, 0.9)),
        "kernel.A_imag": INVERSE[transforms.get("imag", "none")](imag),
        "kernel.B": np.ones((1, S, N, 1)) * [1.0, 0.0] + 0.3 * draw(1, S, N, 2),
        "kernel.C": draw(1 + both_ways, H, N, 2),
    }


def version_3(p: Mapping[str, Array], diag: bool) -> Arrays:
    """The same layer by the older names, with the other sign of the imaginary part."""
    names = {"inv_dt": "log_dt", "A_real": "inv_A_real" if diag else "inv_w_real", "l_kernel": "L"}
    names["A_imag"] = "A_imag" if diag else "w_imag"
    found = {}
    for key, value in p.items():
        name = key.removeprefix("kernel.")
        if name == "A_imag":
            value = -value
        if name == "inv_dt":
            value = value[:, 0]
        if name == "B" and diag:
            value = value[0]
        found[f"kernel.kernel.{names.get(name, name)}" if "kernel" in key else key] = value
    return found | ({"kernel.kernel.A": np.zeros((len(p["kernel.A_real"]), N, 2))} if diag else {})


def minimal(p: Mapping[str, Array]) -> Arrays:
    """The minimal S4D of a layer with B = 1 and a row of A a channel."""
    return {
        "D": p["D"][0],
        "kernel.log_dt": p["kernel.inv_dt"][:, 0],
        "kernel.log_A_real": p["kernel.A_real"],
        "kernel.A_imag": -p["kernel.A_imag"],
        "kernel.C": p["kernel.C"][0],
    }


def output_map(draw: Callable[..., Array], name: str, d_out: int, kind: str = "linear") -> Arrays:
    shape = (d_out, H, 1) if kind == "convolution" else (d_out, H)
    weight, bias = {f"{name}.weight": 0.5 * draw(*shape)}, {f"{name}.bias": 0.5 * draw(d_out)}
    if kind == "weight norm":
        weight = {f"{name}.weight_v": draw(*shape), f"{name}.weight_g": 1 + 0.1 * draw(d_out, 1)}
    return weight | bias


def norm_of(draw: Callable[..., Array], name: str, batch: bool = False) -> Arrays:
    found = {f"{name}.weight": 1 + 0.2 * draw(H), f"{name}.bias": 0.2 * draw(H)}
    if batch:
        found |= {f"{name}.running_mean": 0.3 * draw(H), f"{name}.running_var": np.exp(0.3 * draw(H))}
        found[f"{name}.num_batches_tracked"] = np.array(7)
    return found


def under(prefix: str, p: Mapping[str, Array]) -> Arrays:
    return {prefix + name: value for name, value in p.items()}


# One case a file


class Case(NamedTuple):
    """`s4.convert.function(parameters, **arguments)` maps u to outputs["y"]."""

    function: str
    arguments: dict[str, Any]
    parameters: Arrays
    u: Array
    outputs: Arrays


def single(a: Mapping[str, Array]) -> Arrays:
    """What a file of float32 holds."""
    return {name: v.astype(np.float32) if v.dtype.kind == "f" else v for name, v in a.items()}


def layer(
    seed: int,
    make: Callable[..., Arrays],
    discretization: str = "bilinear",
    stored: Callable[[Arrays], Arrays] = lambda p: p,
    arguments: Mapping[str, Any] | None = None,
    **more: Any,
) -> Case:
    rng = np.random.default_rng(seed)
    transforms = {name: more[name] for name in ("dt", "real", "imag") if name in more}
    p = single(make(lambda *shape: rng.standard_normal(shape), **more))
    u = rng.standard_normal((BATCH, L, H))
    if stored is minimal:
        p["kernel.B"] = np.ones((1, H, N, 1)) * np.array([1.0, 0.0])
    if stored is real_parts:
        p = real_parts(p)
    y, kernel, state = run(systems(p, discretization, **transforms), u)
    outputs = {"y": y, "kernel": kernel}
    if len(kernel) == 1 and not (more.get("per_mode") and "kernel.P" in p):  # whose state has another scale
        outputs["state"] = state
    given = {f"{name}_transform": value for name, value in transforms.items()} | dict(arguments or {})
    return Case("layer", given, p if stored is real_parts else single(stored(p)), u, outputs)


def real_parts(p: Arrays) -> Arrays:
    """is_real=True: real numbers for A, B and C."""
    if "kernel.A_imag" not in p:
        return p
    left = {name: value for name, value in p.items() if name != "kernel.A_imag"}
    return left | {name: p[name][..., 0] for name in ("kernel.B", "kernel.C")}


def blocks(seed: int, stack: Callable[[Callable[..., Array]], tuple[Arrays, Callable[..., Array]]]) -> Any:
    """Parameters, an input and outputs of a stack: (parameters, of parameters and input the output)."""
    rng = np.random.default_rng(seed)
    p, f = stack(lambda *shape: rng.standard_normal(shape))
    p = single(p)
    u = rng.standard_normal((BATCH, L, H))
    return p, u, {"y": f(p, u)}


def s4_block() -> Case:
    def stack(draw: Callable[..., Array]) -> tuple[Arrays, Callable[..., Array]]:
        p = under("layer.", dplr(draw, 1, length=16)) | output_map(draw, "output_linear.0", 2 * H)
        return under("_orig_mod.", p), lambda p, u: u + inner(p, "_orig_mod.", u)

    return Case("block", {}, *blocks(20, stack))


def residual_block(seed: int, batch: bool, prenorm: bool) -> Case:
    def stack(draw: Callable[..., Array]) -> tuple[Arrays, Callable[..., Array]]:
        mix = output_map(draw, "layer.output_linear.0", H, "weight norm")
        p = under("layer.layer.", dplr(draw, 2)) | mix | norm_of(draw, "norm.norm", batch)
        return p, lambda p, u: residual(
            u, lambda x: inner(p, "layer.", x), lambda x: norm(p, "norm.norm", x), prenorm
        )

    return Case("block", {"dt_transform": "exp", "prenorm": prenorm}, *blocks(seed, stack))


def example(seed: int, prenorm: bool) -> Case:
    """Of example.py: minimal S4D layers without, S4Blocks with a norm before each."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape)

    p: Arrays = {"encoder.weight": draw(H, 3), "encoder.bias": draw(H)}
    layers: list[Arrays] = []
    for i in range(2):
        at, kind = f"s4_layers.{i}", "linear" if prenorm else "convolution"
        layers.append(single(dplr(draw) if prenorm else diagonal(draw)))
        if not prenorm:
            layers[i]["kernel.B"] = np.ones((1, H, N, 1)) * np.array([1.0, 0.0])
        p |= under(f"{at}.layer.", layers[i]) if prenorm else under(f"{at}.", minimal(layers[i]))
        p |= output_map(draw, f"{at}.output_linear.0", 2 * H, kind) | norm_of(draw, f"norms.{i}")
    p = single(p | output_map(draw, "decoder", 5))
    u = rng.standard_normal((BATCH, L, 3))
    x = linear(p, "encoder", u)
    for i in range(2):

        def f(x: Array, i: int = i) -> Array:
            y = run(systems(layers[i], "bilinear" if prenorm else "zoh"), x)[0]
            return mixed(p, f"s4_layers.{i}.output_linear.0", gelu(y))

        x = residual(x, f, lambda x, i=i: norm(p, f"norms.{i}", x), prenorm)  # type: ignore[misc]
    return Case("model", {"prenorm": prenorm}, p, u, {"y": linear(p, "decoder", x.mean(1))})


def backbone(seed: int, prenorm: bool) -> Case:
    """Of train.py: S4, FFN, S4; norms before them, a linear encoder, the last output; or not."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape)

    p: Arrays = {"encoder.0.weight": draw(H, 3), "encoder.0.bias": draw(H)} if prenorm else {}
    p |= {} if prenorm else {"encoder.0.weight": draw(7, H)}
    for i in (0, 2):
        p |= under(f"model.layers.{i}.layer.layer.", dplr(draw, 1) if prenorm else diagonal(draw, 2))
        p |= output_map(draw, f"model.layers.{i}.layer.output_linear.0", 2 * H)
    p |= {"model.layers.1.layer.ff.0.0.weight": draw(6, H), "model.layers.1.layer.ff.0.0.bias": draw(6)}
    p |= {"model.layers.1.layer.ff.2.weight": draw(H, 6), "model.layers.1.layer.ff.2.bias": draw(H)}
    for name in [f"layers.{i}." for i in range(3)] + [""] * prenorm:
        p |= norm_of(draw, f"model.{name}norm.norm")
    p = single(p | output_map(draw, "decoder.0.output_transform", 5))
    u = rng.standard_normal((BATCH, L, 3)) if prenorm else rng.integers(0, 7, (BATCH, L))
    x = linear(p, "encoder.0", u) if prenorm else p["encoder.0.weight"].astype(np.float64)[u]
    for i in range(3):

        def f(x: Array, i: int = i) -> Array:
            at = f"model.layers.{i}.layer."
            if i == 1:
                return linear(p, f"{at}ff.2", gelu(linear(p, f"{at}ff.0.0", x)))
            return inner(p, at, x)

        x = residual(x, f, lambda x, i=i: norm(p, f"model.layers.{i}.norm.norm", x), prenorm)  # type: ignore[misc]
    if prenorm:
        x = norm(p, "model.norm.norm", x)[:, -1]
    y = linear(p, "decoder.0.output_transform", x)
    return Case("model", {"pooling": "last" if prenorm else "none", "dt_transform": "exp"}, p, u, {"y": y})


def cases() -> dict[str, Case]:
    """By name."""
    return {
        "dplr": layer(0, dplr, length=16),
        "dplr-rank2-shared": layer(1, dplr, S=1, rank=2),
        "dplr-rank3-both-ways": layer(2, dplr, S=2, rank=3, length=24, both_ways=True),
        "dplr-transforms": layer(3, dplr, length=5, dt="softplus", real="relu", imag="exp"),
        "dplr-dt-per-mode": layer(4, dplr, S=2, length=16, per_mode=True),
        "diag-zoh": layer(5, diagonal, "zoh"),
        "diag-bilinear": layer(6, diagonal, arguments={"discretization": "bilinear"}, S=2, both_ways=True),
        "diag-transforms": layer(7, diagonal, "zoh", S=1, dt="sigmoid", real="sigmoid", imag="softplus"),
        "diag-dt-per-mode": layer(8, diagonal, "zoh", S=2, per_mode=True, dt="none", real="none"),
        "diag-dt-per-mode-bilinear": layer(
            9, diagonal, arguments={"discretization": "bilinear"}, per_mode=True
        ),
        "diag-real": layer(10, diagonal, "zoh", real_parts, S=2),
        "version3-dplr": layer(11, dplr, stored=lambda p: version_3(p, False), S=2, length=16),
        "version3-diag": layer(12, diagonal, stored=lambda p: version_3(p, True)),
        "minimal": layer(13, diagonal, "zoh", minimal),
        "block": s4_block(),
        "residual-block": residual_block(21, batch=False, prenorm=True),
        "residual-block-batch-postnorm": residual_block(22, batch=True, prenorm=False),
        "example-minimal": example(30, prenorm=False),
        "example-dplr-prenorm": example(31, prenorm=True),
        "train-prenorm": backbone(32, prenorm=True),
        "train-postnorm": backbone(33, prenorm=False),
    }


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, case in cases().items():
        arrays = {f"parameters/{key}": value for key, value in case.parameters.items()}
        arrays |= {"u": case.u, **case.outputs}
        told = {"function": case.function, "arguments": json.dumps(case.arguments)}
        contiguous = {key: np.ascontiguousarray(value).reshape(value.shape) for key, value in arrays.items()}
        save_file(contiguous, HERE / f"{name}.safetensors", told)
