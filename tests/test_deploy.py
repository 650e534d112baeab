"""s4.deploy.freeze: constants that compute what the model does, and what it refuses."""

import copy
import sys
from pathlib import Path

import oracle
import pytest
import stacks
import torch
from refusals import refuses
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from s4 import S4Block, S4Layer, S4Model, State
from s4.deploy import Frozen, export, freeze

LAYERS = {
    "dplr": {"variant": "dplr"},
    "dplr legt": {"variant": "dplr", "init": "legt", "n_ssm": 2},
    "diag": {"variant": "diag"},
    "diag two": {"variant": "diag", "init": "lin", "discretization": "bilinear", "d_state": 2},
    "dplr two": {"variant": "dplr", "d_state": 2},
}
MODES = ("fft", "scan")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
DTYPES = tuple(TOLERANCE)


def layer_of(kind: str, both: bool = False, dtype: torch.dtype = torch.float64) -> S4Layer:
    """Four channels that remember tens to hundreds of steps."""
    options = {"d_state": 8, "dt_min": 0.01, "bidirectional": both, **LAYERS[kind]}
    return S4Layer(4, dtype=dtype, **options).eval()


def both_dtypes(kind: str, both: bool, dtype: torch.dtype) -> tuple[S4Layer, S4Layer]:
    """A layer, and the same numbers in float64 to compare with."""
    layer = layer_of(kind, both, dtype)
    return layer, copy.deepcopy(layer).double()


@pytest.mark.promise(
    "s4.deploy", "`freeze`: forward equals the layer to 1e-5 in float32, 1e-9 in float64, at any length"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("both", [False, True], ids=["causal", "both"])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward(kind: str, both: bool, mode: str, dtype: torch.dtype) -> None:
    layer, exact = both_dtypes(kind, both, dtype)
    frozen = freeze(layer, 300, mode=mode)
    for batch, length in [(3, 1), (1, 2), (2, 60), (2, 61), (1, 129), (2, 300)]:
        u = torch.randn(batch, length, 4, dtype=dtype)
        y = frozen(u)
        assert y.dtype == dtype
        oracle.close(y, exact(u.double()), TOLERANCE[dtype], f"{batch, length}")


@pytest.mark.promise(
    "s4.deploy", "`freeze`: chunk and step equal the layer, outputs and states, from any state"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64, 130, 257])
@pytest.mark.parametrize("kind", LAYERS)
def test_chunk_and_step(kind: str, chunk: int, dtype: torch.dtype) -> None:
    """130 and 257 are no multiples of the tiles they are computed in."""
    layer, exact = both_dtypes(kind, False, dtype)
    frozen = freeze(layer, chunk=chunk)
    u = torch.randn(3, chunk, 4, dtype=dtype)
    x = torch.randn(3, 4, layer.d_state, dtype=dtype)
    y, after = frozen.chunk(u, x)
    want, state = exact(u.double(), x.double(), return_state=True)
    assert after.is_contiguous()
    assert y.is_contiguous()
    oracle.close(y, want, TOLERANCE[dtype])
    oracle.close(after, state, TOLERANCE[dtype])
    y, after = frozen.step(u[:, 0], x)
    want, state = exact.step(u[:, 0].double(), x.double())
    oracle.close(y, want, TOLERANCE[dtype])
    oracle.close(after, state, TOLERANCE[dtype])
    assert torch.equal(frozen.initial_state(2), layer.initial_state(2))


@pytest.mark.parametrize("mode", MODES)
def test_long_memory_in_large_layers(mode: str) -> None:
    """N = 64 in tiles of 128 over seven levels, to the longest length."""
    layer = S4Layer(3, 64, dt_min=1e-4, dt_max=1e-2)
    u = torch.randn(1, 12_000, 3)
    exact = copy.deepcopy(layer).double()(u.double())
    oracle.close(freeze(layer, 12_000, mode=mode)(u), exact, 1e-5)


@pytest.mark.promise(
    "s4.deploy", "`freeze` of a model: blocks of every norm, feed-forward, tied dropout, each pooling, tokens"
)
@pytest.mark.parametrize(("tokens", "mode"), [(False, "fft"), (True, "scan")], ids=["numbers", "tokens"])
@pytest.mark.parametrize(("stack", "block", "pooling"), stacks.TABLE)
def test_model(stack: str, block: str, pooling: str, tokens: bool, mode: str) -> None:
    model = stacks.trained(stack, block, pooling, tokens=tokens)
    frozen = freeze(model, stacks.L, chunk=9, mode=mode)
    u = stacks.inputs(3, tokens)
    oracle.close(frozen(u), model(u), 1e-9)
    state, want = frozen.initial_state(3), model.initial_state(3)
    for piece in (u[:, :9], u[:, 9:18]):
        y, state = frozen.chunk(piece, state)
        y_want, want = model(piece, want, return_state=True)
        oracle.close(y, y_want, 1e-9)
    y, state = frozen.step(u[:, 18], state)
    y_want, want = model.step(u[:, 18], want)
    oracle.close(y, y_want, 1e-9)
    assert isinstance(state, State)
    stacks.same(state, want)


def test_model_both_ways_and_with_feed_forward() -> None:
    blocks = [S4Block(S4Layer(6, 8, bidirectional=True), d_ff=9, norm="batch") for _ in range(2)]
    model = S4Model(nn.Linear(3, 6), blocks, nn.Linear(6, 2), pooling="mean")
    model(3 * torch.randn(4, 20, 3) + 1)  # statistics away from (0, 1)
    frozen = freeze(model, 40)
    u = torch.randn(2, 33, 3)
    oracle.close(frozen(u), copy.deepcopy(model).eval().double()(u.double()), 1e-5)
    assert model.training
    assert not frozen.train().training


def test_rate_is_frozen_with_the_rest() -> None:
    layer, u = layer_of("dplr"), torch.randn(2, 50, 4).double()
    frozen = freeze(layer, 50, chunk=50, rate=0.5)
    oracle.close(frozen(u), layer(u, rate=0.5), 1e-9)
    oracle.close(frozen.chunk(u, layer.initial_state(2))[0], layer(u, rate=0.5), 1e-9)


class Around(nn.Module):
    """Somebody's own module, with one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.inner = nn.ModuleList([layer_of("diag", dtype=torch.float32), S4Block(S4Layer(4, 8))])
        self.again = self.inner[0]

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.first(x) * scale
        for part in self.inner:
            x = part(x)
        return self.again(x)


@pytest.mark.promise(
    "s4.deploy", "`freeze` of any module with S4 layers inside: a copy, the original untouched"
)
def test_any_module() -> None:
    model = Around()
    before = copy.deepcopy(model.state_dict())
    frozen = freeze(model, 40)
    assert isinstance(frozen, Around)
    assert frozen.again is frozen.inner[0]
    assert not any(isinstance(part, S4Layer) for part in frozen.modules())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert [*before] == [*model.state_dict()]
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    u = torch.randn(2, 33, 2)
    exact = copy.deepcopy(model).eval().double()
    oracle.close(frozen(u, 2.0), exact(u.double(), 2.0), 1e-5)
    kept = frozen(u)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(frozen(u), kept)


class Seen(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.promise(
    "s4.deploy", "no operator of ours, no complex number in parameters or buffers, nothing to differentiate"
)
@pytest.mark.parametrize("kind", ["dplr", "diag"])
def test_plain_operators_and_real_constants(kind: str) -> None:
    for mode in MODES:
        frozen = freeze(layer_of(kind), 70, mode=mode)
        with Seen() as seen:
            frozen(torch.randn(1, 70, 4).double())
            frozen.chunk(torch.randn(1, 64, 4).double(), frozen.initial_state(1))
            y, _ = frozen.step(torch.randn(1, 4).double(), frozen.initial_state(1))
        assert seen.names
        assert not [name for name in seen.names if not name.startswith(("aten.", "prim"))]
        assert not y.requires_grad
        assert not [*frozen.parameters()]
        assert not [b for b in frozen.buffers() if b.is_complex()]


@pytest.mark.promise(
    "s4.deploy", "frozen modules are saved and loaded by `torch.save`, `state_dict` and copies"
)
def test_frozen_modules_are_kept(tmp_path: Path) -> None:
    model, u = stacks.trained("mixed", "prenorm", "mean"), stacks.inputs()
    frozen = freeze(model, stacks.L)
    torch.save(frozen, tmp_path / "frozen.pt")
    loaded = torch.load(tmp_path / "frozen.pt", weights_only=False)
    assert torch.equal(loaded(u), frozen(u))
    other = freeze(stacks.trained("mixed", "prenorm", "mean"), stacks.L)
    assert not torch.equal(other(u), frozen(u))
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(u), frozen(u))
    assert torch.equal(copy.deepcopy(frozen)(u), frozen(u))


@pytest.mark.promise(
    "s4.deploy", "half-precision inputs and autocast: constants and states keep their precision"
)
def test_inputs_of_lower_precision() -> None:
    layer = layer_of("dplr", dtype=torch.float32)
    u = torch.randn(2, 64, 4).bfloat16()
    want, state = copy.deepcopy(layer).double()(u.double(), return_state=True)
    for mode in MODES:
        frozen = freeze(layer, 64, mode=mode)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [frozen(u.float()), frozen.chunk(u.float(), frozen.initial_state(2))]
            y = frozen(u)
            _, after = frozen.step(u[:, 0], frozen.initial_state(2))
        oracle.close(outputs[0], want, 1e-5)
        oracle.close(outputs[1][0], want, 1e-5)
        oracle.close(outputs[1][1], state, 1e-5)
        assert y.dtype == torch.bfloat16
        assert after.dtype == torch.float32
        oracle.close(y, want, 2**-8)
        oracle.close(after, layer.step(u[:, 0].float(), layer.initial_state(2))[1], 1e-5)


@pytest.mark.promise(
    "s4.deploy", "sequences longer than max_length, or of another length than chunk", supported=False
)
def test_lengths_that_are_refused() -> None:
    for frozen in (freeze(layer_of("dplr"), 10, mode="fft"), freeze(stacks.trained(), 10, mode="scan")):
        width = 4 if isinstance(frozen.module, nn.Module) and hasattr(frozen.module, "d_model") else 3
        for length in (0, 11):
            u = torch.zeros(1, length, width).double()
            refuses(ValueError, rf"1 to max_length=10 steps, got {length}", lambda f=frozen, u=u: f(u))
        u = torch.zeros(1, 63, width).double()
        refuses(ValueError, "chunk=64 steps, got 63", lambda f=frozen, u=u: f.chunk(u, f.initial_state(1)))
    refuses(
        ValueError,
        "forward needs max_length",
        lambda: freeze(layer_of("dplr"))(torch.zeros(1, 1, 4).double()),
    )
    refuses(ValueError, "forward needs max_length", lambda: freeze(Around())(torch.zeros(1, 1, 2)))


@pytest.mark.promise("s4.deploy", "chunk, step and states of bidirectional layers", supported=False)
@pytest.mark.parametrize("part", ["chunk", "step", "initial_state"])
def test_parts_of_bidirectional_layers(part: str, tmp_path: Path) -> None:
    u, x = torch.zeros(1, 64, 4).double(), torch.zeros(1, 4, 8).double()
    frozen = freeze(layer_of("dplr", both=True), 10)
    calls = {
        "chunk": lambda: frozen.chunk(u, x),
        "step": lambda: frozen.step(u[:, 0], x),
        "initial_state": lambda: frozen.initial_state(1),
    }
    refuses(ValueError, f"{part} needs a causal layer.*bidirectional=True", calls[part])
    if part != "initial_state":
        layer = layer_of("dplr", both=True)
        refuses(ValueError, "causal layer", lambda: export(layer, tmp_path / "x.pt2", part))


@pytest.mark.promise(
    "s4.deploy", "lengths of padded sequences, resets, another rate than that frozen", supported=False
)
def test_lengths_and_rate_of_a_frozen_layer() -> None:
    frozen, u = freeze(layer_of("dplr"), 10).module, torch.zeros(2, 10, 4).double()
    refuses(ValueError, "lengths must be None", lambda: frozen(u, lengths=torch.tensor([3, 10])))
    refuses(ValueError, "resets must be None", lambda: frozen(u, resets=torch.ones(2, 10) > 0))
    refuses(ValueError, "rate is frozen at 1.0, got 2.0: freeze", lambda: frozen(u, rate=2.0))
    refuses(
        ValueError,
        "rate is frozen at 1.0, got 2.0: freeze",
        lambda: frozen.step(u[:, 0], frozen.initial_state(2), rate=2.0),
    )


def test_the_rate_that_was_frozen_may_be_said_again() -> None:
    """As by a module that passes it to its layer."""
    layer, u = layer_of("dplr"), torch.randn(2, 10, 4).double()
    frozen = freeze(layer, 10, rate=0.5).module
    oracle.close(frozen(u, rate=0.5), layer(u, rate=0.5), 1e-9)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", ["forward", "step"])
def test_files_of_blocks_in_half_precision(part: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Have inputs and outputs of the block's dtype."""
    block = S4Block(S4Layer(4, 8)).to(dtype)
    run = torch.export.load(export(block, tmp_path / "x.pt2", part, max_length=10)).module()
    u = torch.randn(2, 7, 4, dtype=dtype)
    if part == "forward":
        got, want = run(u), block.eval()(u)
    else:
        state = freeze(block).part("step").initial_state(2)
        got, want = run(u[:, 0], state)[0], block.eval().step(u[:, 0], state["state_0"])[0]
    assert got.dtype == dtype
    oracle.close(got.float(), want.float(), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"max_length": 2.5}, "max_length must be an integer"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"mode": "auto"}, "mode must be one of 'fft', 'scan', got 'auto'"),
        ({"rate": 0}, "rate must be finite and above 0"),
        ({"model": nn.Linear(2, 2)}, "S4Layer inside, got Linear"),
        ({"model": freeze(S4Layer(2, 2))}, "frozen already"),
        ({"model": "x"}, "model must be a torch.nn.Module"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_options(options: dict[str, object], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        freeze(**{"model": layer_of("dplr"), **options})  # type: ignore[arg-type]


def test_onnx_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refuses(
        ImportError,
        "pip install onnx onnxscript",
        lambda: export(layer_of("dplr"), tmp_path / "x.onnx", max_length=5),
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.promise(
    "s4.deploy", "files of another suffix than .onnx and .pt2, parts that a module has not", supported=False
)
def test_what_is_not_exported(tmp_path: Path) -> None:
    layer, file = layer_of("dplr"), tmp_path / "x.pt2"
    refuses(ValueError, r"'\.onnx' or '\.pt2'.*'x\.pt'", lambda: export(layer, "x.pt", max_length=5))
    refuses(ValueError, "part must be one of 'forward', 'chunk', 'step'", lambda: export(layer, file, "all"))
    refuses(ValueError, "needs max_length", lambda: export(layer, file))
    refuses(ValueError, "S4Model: freeze those, got Around", lambda: export(Around(), file, "step"))
    refuses(ValueError, "example=.* must be given: Around", lambda: export(Around(), file, max_length=5))
    refuses(FileNotFoundError, "nowhere", lambda: export(layer, tmp_path / "nowhere" / "x.pt2", max_length=5))
    half = S4Block(S4Layer(4, 8, dtype="bfloat16"))
    refuses(ValueError, "no bfloat16", lambda: export(half, tmp_path / "x.onnx", max_length=5))
    frozen = freeze(layer, 5)
    assert isinstance(frozen, Frozen)
    refuses(ValueError, "are its own", lambda: export(frozen, file, max_length=5))
    refuses(ValueError, "needs max_length", lambda: export(freeze(layer), file))
    refuses(ValueError, "mode='scan'.* for .onnx", lambda: export(frozen, tmp_path / "x.onnx"))
    refuses(ValueError, "part must be one of", lambda: frozen.part("all"))
    refuses(ValueError, "chunk needs a state", lambda: frozen.part("chunk")(torch.zeros(1, 64, 4)))
    assert not file.exists()
