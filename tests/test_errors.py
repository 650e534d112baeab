"""Every public argument refuses what it cannot take, with a ValueError or TypeError that names it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import EITHER, Kind, refuses
from stacks import small
from torch import nn

from s4 import S4Block, S4Layer

pytestmark = pytest.mark.usefixtures("unchecked")
# what is wrong: (keywords of S4Layer, error, what the message must say)
LAYER = {
    "odd d_state": ({"d_state": 7}, ValueError, "d_state.*7"),
    "no d_state": ({"d_state": 0}, ValueError, "d_state.*0"),
    "negative d_state": ({"d_state": -2}, ValueError, "d_state.*-2"),
    "float d_state": ({"d_state": 8.0}, EITHER, r"d_state.*8\.0"),
    "no d_model": ({"d_model": 0}, ValueError, "d_model.*0"),
    "float d_model": ({"d_model": 4.0}, EITHER, r"d_model.*4\.0"),
    "n_ssm no divisor": ({"n_ssm": 3}, ValueError, "n_ssm.*3"),
    "no n_ssm": ({"n_ssm": 0}, ValueError, "n_ssm.*0"),
    "unknown variant": ({"variant": "s5"}, ValueError, "variant.*dplr.*diag.*s5"),
    "unknown init": ({"init": "hippo"}, ValueError, "init.*legs.*hippo"),
    "dplr with lin": ({"init": "lin"}, ValueError, "init.*lin"),
    "dplr with inv": ({"init": "inv"}, ValueError, "init.*inv"),
    "diag with legt": ({"variant": "diag", "init": "legt"}, ValueError, "init.*legt"),
    "diag with fout": ({"variant": "diag", "init": "fout"}, ValueError, "init.*fout"),
    "unknown discretization": ({"discretization": "euler"}, ValueError, "discretization.*bilinear.*euler"),
    "dplr with zoh": ({"discretization": "zoh"}, ValueError, "discretization.*zoh"),
    "empty discretization": ({"discretization": ""}, ValueError, "discretization"),
    "dt_min zero": ({"dt_min": 0.0}, ValueError, "dt_min"),
    "dt_min negative": ({"dt_min": -1e-3}, ValueError, "dt_min"),
    "dt_max below dt_min": ({"dt_min": 0.1, "dt_max": 0.01}, ValueError, r"dt_max.*dt_min=0\.1.*0\.01"),
    "d_model of no machine": ({"d_model": 2**62}, ValueError, "d_model.*at most"),
    "d_state of no machine": ({"d_state": 2**62}, ValueError, "d_state.*at most"),
    "dt_max infinite": ({"dt_max": float("inf")}, ValueError, "dt_max"),
    "dt_max nan": ({"dt_max": float("nan")}, ValueError, "dt_max"),
    "unknown mode": ({"mode": "loop"}, ValueError, "mode.*fft.*loop"),
    "unknown backend": ({"backend": "magic"}, ValueError, "backend.*torch.*magic"),
    "parameters of a byte": ({"dtype": torch.float8_e5m2}, TypeError, "dtype.*bfloat16.*float8_e5m2"),
    "complex parameters": ({"dtype": torch.complex64}, TypeError, "dtype.*complex64"),
    "two directions": ({"bidirectional": 2}, EITHER, "bidirectional.*2"),
    "bidirectional a word": ({"bidirectional": "no"}, EITHER, "bidirectional.*no"),
    "bidirectional none": ({"bidirectional": None}, EITHER, "bidirectional.*None"),
    "dt_min a word": ({"dt_min": "a"}, EITHER, "dt_min.*a"),
    "dt_max none": ({"dt_max": None}, EITHER, "dt_max.*None"),
    "backends": ({"backend": ["torch"]}, EITHER, r"backend.*\['torch'\]"),
    "variants": ({"variant": ["dplr"]}, EITHER, r"variant.*\['dplr'\]"),
    "dtype a word": ({"dtype": "single"}, EITHER, "dtype.*float32.*single"),
}


@pytest.mark.parametrize(("keywords", "kind", "match"), LAYER.values(), ids=LAYER)
def test_layer_options(keywords: dict[str, Any], kind: Kind, match: str) -> None:
    refuses(kind, match, lambda: S4Layer(**({"d_model": 4, "d_state": 8} | keywords)))


def test_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="l_max"):
        S4Layer(4, 8, l_max=100)


def causal() -> S4Layer:
    return S4Layer(4, 8)


def both() -> S4Layer:
    return S4Layer(4, 8, bidirectional=True)


def bytes_only() -> S4Layer:
    return causal().to(torch.float8_e5m2)


U, X = torch.zeros(2, 5, 4), torch.zeros(2, 4, 8)
T = torch.zeros(2, 5, dtype=torch.long)
CALLS: dict[str, tuple[Callable[[], Any], Kind, str]] = {
    "u of rank 2": (lambda: causal()(U[0]), ValueError, r"u .*\(5, 4\)"),
    "u of rank 4": (lambda: causal()(U[None]), ValueError, r"u .*\(1, 2, 5, 4\)"),
    "u of another width": (lambda: causal()(U[..., :3]), ValueError, r"u .*4.*\(2, 5, 3\)"),
    "u channels first": (lambda: causal()(U.mT), ValueError, r"u .*4.*\(2, 4, 5\)"),
    "integer u": (lambda: causal()(U.long()), TypeError, "u .*int64"),
    "complex u": (lambda: causal()(U + 0j), TypeError, "u .*complex64"),
    "boolean u": (lambda: causal()(U > 0), TypeError, "u .*bool"),
    "u an array": (lambda: causal()(U.numpy()), TypeError, "u .*ndarray"),
    "dt set": (lambda: setattr(causal(), "dt", 0.1), AttributeError, "dt is read-only.*log_dt"),
    "Lambda set": (lambda: setattr(causal(), "Lambda", 0.1), AttributeError, "Lambda.*log_A_real and A_imag"),
    "state of another batch": (lambda: causal()(U, X[:1]), ValueError, r"state .*\(2, 4, 8\).*\(1, 4, 8\)"),
    "state of another size": (
        lambda: causal()(U, X[..., :6]),
        ValueError,
        r"state .*\(2, 4, 8\).*\(2, 4, 6\)",
    ),
    "state without batch": (lambda: causal()(U, X[0]), ValueError, r"state .*\(4, 8\)"),
    "state of another dtype": (lambda: causal()(U, X.double()), TypeError, "state .*float64"),
    "complex state": (lambda: causal()(U, X + 0j), TypeError, "state .*complex64"),
    "state both ways": (lambda: both()(U, X), ValueError, "bidirectional"),
    "return_state both ways": (
        lambda: both()(U, return_state=True),
        ValueError,
        "return_state.*bidirectional",
    ),
    "step both ways": (lambda: both().step(U[:, 0], X), ValueError, "step.*bidirectional"),
    "initial_state both ways": (lambda: both().initial_state(2), ValueError, "initial_state.*bidirectional"),
    "step with a sequence": (lambda: causal().step(U, X), ValueError, r"u .*\(2, 5, 4\)"),
    "step of another width": (lambda: causal().step(U[:, 0, :3], X), ValueError, r"u .*4.*\(2, 3\)"),
    "step with integers": (lambda: causal().step(U[:, 0].long(), X), TypeError, "u .*int64"),
    "step with another batch": (lambda: causal().step(U[:1, 0], X), ValueError, "state"),
    "step without state": (lambda: causal().step(U[:, 0], None), EITHER, "state"),
    "step at no rate": (lambda: causal().step(U[:, 0], X, rate=0.0), ValueError, "rate.*0"),
    "lengths of another batch": (
        lambda: causal()(U, lengths=torch.tensor([1, 2, 3])),
        ValueError,
        r"lengths .*\(2,\).*\(3,\)",
    ),
    "lengths of rank 2": (
        lambda: causal()(U, lengths=torch.tensor([[1, 2]])),
        ValueError,
        r"lengths .*\(1, 2\)",
    ),
    "lengths not integers": (
        lambda: causal()(U, lengths=torch.tensor([1.0, 2.0])),
        TypeError,
        "lengths .*float32",
    ),
    "lengths a mask": (lambda: causal()(U, lengths=torch.tensor([True, False])), TypeError, "lengths .*bool"),
    "lengths complex": (
        lambda: causal()(U, lengths=torch.tensor([1j, 2j])),
        TypeError,
        "lengths .*complex64",
    ),
    "lengths a list": (lambda: causal()(U, lengths=[1, 2]), TypeError, "lengths .*list"),
    "lengths too long": (lambda: causal()(U, lengths=torch.tensor([1, 6])), ValueError, "lengths .*5.*6"),
    "lengths negative": (lambda: causal()(U, lengths=torch.tensor([1, -1])), ValueError, "lengths .*-1"),
    "no rate": (lambda: causal()(U, rate=0.0), ValueError, "rate.*0"),
    "negative rate": (lambda: causal()(U, rate=-1.0), ValueError, "rate.*-1"),
    "infinite rate": (lambda: causal()(U, rate=float("inf")), ValueError, "rate.*inf"),
    "rate nan": (lambda: causal()(U, rate=float("nan")), ValueError, "rate.*nan"),
    "kernel of negative length": (lambda: causal().kernel(-1), ValueError, "L .*-1"),
    "kernel of no machine": (lambda: causal().kernel(2**62), ValueError, f"L .*at most.*{2**62}"),
    "batch size of no machine": (
        lambda: causal().initial_state(2**62),
        ValueError,
        f"batch_size.*at most.*{2**62}",
    ),
    "config of float8": (lambda: bytes_only().config(), ValueError, "dtype.*float32.*float8_e5m2"),
    "kernel of half a length": (lambda: causal().kernel(2.5), EITHER, r"L .*2\.5"),
    "kernel at no rate": (lambda: causal().kernel(3, rate=0.0), ValueError, "rate.*0"),
    "dense at a negative rate": (lambda: causal().dense(rate=-2.0), ValueError, "rate.*-2"),
    "float8 parameters": (lambda: bytes_only()(U), TypeError, "float16.*float8_e5m2"),
    "float8 parameters in step": (lambda: bytes_only().step(U[:, 0], X), TypeError, "float8_e5m2"),
    "float8 parameters in kernel": (lambda: bytes_only().kernel(4), TypeError, "float8_e5m2"),
    "batch size negative": (lambda: causal().initial_state(-1), EITHER, "batch_size.*-1"),
    "batch size half": (lambda: causal().initial_state(2.5), EITHER, r"batch_size.*2\.5"),
    "batch size a flag": (lambda: causal().initial_state(True), EITHER, "batch_size.*True"),
    "batch size none": (lambda: causal().initial_state(None), EITHER, "batch_size.*None"),
    "kernel of a flag": (lambda: causal().kernel(True), EITHER, "L .*True"),
    "resets integers": (
        lambda: causal()(U, resets=torch.ones(U.shape[:2]).long()),
        TypeError,
        "resets.*int64",
    ),
    "resets a list": (lambda: causal()(U, resets=[[True]]), TypeError, "resets.*list"),
    "resets a row": (lambda: causal()(U, resets=torch.ones(2) > 0), ValueError, r"resets.*\(2,\)"),
    "resets elsewhere": (
        lambda: causal()(U, resets=torch.ones(U.shape[:2], dtype=torch.bool, device="meta")),
        ValueError,
        "resets .*meta",
    ),
    "positions past the end": (
        lambda: causal().states(U, torch.tensor([[0], [U.shape[1]]])),
        ValueError,
        rf"positions.*0\.\.{U.shape[1]}",
    ),
    "positions before the state": (
        lambda: causal().states(U, torch.tensor([[0], [-2]])),
        ValueError,
        r"positions.*-2\.\.0",
    ),
    "positions a row": (lambda: causal().states(U, torch.tensor([0, 1])), ValueError, r"positions.*\(2,\)"),
    "positions halves": (lambda: causal().states(U, torch.ones(2, 1)), TypeError, "positions.*float32"),
    "states of two directions": (
        lambda: S4Layer(4, 8, bidirectional=True).states(U, torch.tensor([[0], [0]])),
        ValueError,
        "states.*bidirectional",
    ),
    "u elsewhere": (lambda: causal()(U.to("meta")), ValueError, "u .*meta"),
    "state elsewhere": (lambda: causal()(U, X.to("meta")), ValueError, "state .*meta"),
    "lengths elsewhere": (
        lambda: causal()(U, lengths=torch.tensor([1, 2], device="meta")),
        ValueError,
        "lengths .*meta",
    ),
    "u elsewhere in step": (lambda: causal().step(U[:, 0].to("meta"), X), ValueError, "u .*meta"),
    "state elsewhere in step": (lambda: causal().step(U[:, 0], X.to("meta")), ValueError, "state .*meta"),
}


@pytest.mark.parametrize(("call", "kind", "match"), CALLS.values(), ids=CALLS)
def test_layer_calls(call: Callable[[], Any], kind: Kind, match: str) -> None:
    refuses(kind, match, call)


RATES = {
    "word": ("a", "a"),
    "none": (None, "None"),
    "three of two": (torch.ones(3), r"\(3,\)|tensor"),
    "one in a tensor": (torch.tensor(1.0), r"\(\)|tensor"),
    "integers": (torch.ones(2, dtype=torch.long), "int64|tensor"),
    "none between": (torch.tensor([1.0, 0.0]), "above 0|tensor"),
    "endless": (torch.tensor([1.0, float("inf")]), "finite|tensor"),
    "elsewhere": (torch.ones(2, device="meta"), "meta|tensor"),
    "zero": (0, "0"),
    "infinite": (float("inf"), "inf"),
    "nan": (float("nan"), "nan"),
}


@pytest.mark.parametrize(("rate", "match"), RATES.values(), ids=RATES)
def test_rate(rate: Any, match: str) -> None:
    for call in (
        lambda: causal()(U, rate=rate),
        lambda: causal().step(U[:, 0], X, rate=rate),
        lambda: causal().kernel(3, rate=rate),
        lambda: causal().dense(rate=rate),
        lambda: S4Block(causal())(U, rate=rate),
        lambda: small()(T, rate=rate),
        lambda: small().step(T[:, 0], small().initial_state(2), rate=rate),
        lambda: small().generate(T, 2, rate=rate),
    ):
        refuses(EITHER, f"rate.*({match})", call)


def narrow() -> S4Block:
    """In bfloat16 but for its S4 layer."""
    block = S4Block(causal(), norm="batch").bfloat16()
    block.layer.float()
    return block


BLOCK = {
    "no layer": (lambda: S4Block(nn.Linear(4, 4)), TypeError, "layer.*Linear"),
    "unknown norm": (lambda: S4Block(causal(), norm="group"), ValueError, "norm.*layer.*group"),
    "unknown activation": (
        lambda: S4Block(causal(), activation="sine"),
        ValueError,
        "activation.*gelu.*sine",
    ),
    "unknown mixer": (lambda: S4Block(causal(), mixer="attention"), ValueError, "mixer.*glu.*attention"),
    "negative d_ff": (lambda: S4Block(causal(), d_ff=-1), ValueError, "d_ff.*-1"),
    "fractional d_ff": (lambda: S4Block(causal(), d_ff=4.0), TypeError, r"d_ff.*4\.0"),
    "negative dropout": (lambda: S4Block(causal(), dropout=-0.1), ValueError, r"dropout.*-0\.1"),
    "dropout of all": (lambda: S4Block(causal(), dropout=1.5), ValueError, r"dropout.*1\.5"),
    "dropout of everything": (lambda: S4Block(causal(), dropout=1.0), ValueError, r"dropout.*1\.0"),
    "dropout a word": (lambda: S4Block(causal(), dropout="x"), EITHER, "dropout.*x"),
    "dropout none": (lambda: S4Block(causal(), dropout=None), EITHER, "dropout.*None"),
    "prenorm a word": (lambda: S4Block(causal(), prenorm="yes"), EITHER, "prenorm.*yes"),
    "tie_dropout a word": (lambda: S4Block(causal(), tie_dropout="x"), EITHER, "tie_dropout.*x"),
    "norms": (lambda: S4Block(causal(), norm=["layer"]), EITHER, r"norm.*\['layer'\]"),
    "sequence elsewhere": (lambda: S4Block(causal())(U.to("meta")), EITHER, "[xu] .*meta"),
    "step elsewhere": (lambda: S4Block(causal()).step(U[:, 0].to("meta"), X), EITHER, "[xu] .*meta"),
    "sequence of another dtype": (
        lambda: S4Block(causal())(U.double()),
        TypeError,
        "x must suit.*float32 on cpu, got torch.float64",
    ),
    "step of another dtype": (
        lambda: S4Block(causal(), norm="rms", prenorm=False).step(U[:, 0].bfloat16(), X),
        TypeError,
        "x must suit.*float32 on cpu, got torch.bfloat16",
    ),
    "sequence of the layer's dtype alone": (
        lambda: narrow()(U),
        TypeError,
        "x must suit.*of torch.bfloat16 on cpu, got torch.float32",
    ),
    "lengths elsewhere": (
        lambda: S4Block(causal())(U, lengths=torch.tensor([1, 2], device="meta")),
        ValueError,
        "lengths .*meta",
    ),
    "sequence of another width": (lambda: S4Block(causal())(U[..., :3]), ValueError, r"\(2, 5, 3\)"),
    "sequence of rank 2": (lambda: S4Block(causal())(U[0]), ValueError, r"\(5, 4\)"),
    "sequence to step": (lambda: S4Block(causal()).step(U, X), ValueError, r"\(2, 5, 4\)"),
    "width to step": (lambda: S4Block(causal()).step(U[:, 0, :3], X), ValueError, r"\(2, 3\)"),
    "state": (lambda: S4Block(causal())(U, X[:1]), ValueError, r"state .*\(1, 4, 8\)"),
    "state both ways": (lambda: S4Block(both())(U, X), ValueError, "bidirectional"),
    "step both ways": (lambda: S4Block(both()).step(U[:, 0], X), ValueError, "bidirectional"),
    "lengths with batch norm": (
        lambda: S4Block(causal(), norm="batch")(U, lengths=torch.tensor([1, 6])),
        ValueError,
        "lengths .*6",
    ),
    "lengths as a list": (
        lambda: S4Block(causal(), norm="batch")(U, lengths=[1, 2]),
        TypeError,
        "lengths .*list",
    ),
}


@pytest.mark.parametrize(("call", "kind", "match"), BLOCK.values(), ids=BLOCK)
def test_block(call: Callable[[], Any], kind: Kind, match: str) -> None:
    refuses(kind, match, call)
