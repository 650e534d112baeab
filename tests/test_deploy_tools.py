"""What frozen models go through: ONNX, torch.export without s4, AOTInductor, TorchScript, int8 weights."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from processes import printed, process
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model, State
from s4.deploy import export, freeze

pytestmark = pytest.mark.usefixtures("unchecked")
LONGEST, CHUNK = 150, 16
NAMES = ["state_0", "total", "length"]
SHAPES = [(1, 1), (3, 1), (2, 75), (1, 76), (3, LONGEST)]  # tiles of a file have 75 steps


def model_of(pooling: str = "mean", both: bool = False) -> S4Model:
    """One block in evaluation, for tokens and diagonal where outputs are pooled to the last."""
    last = pooling == "last"
    layer = S4Layer(6, 8, variant="diag" if last else "dplr", dt_min=0.01, bidirectional=both)
    block = S4Block(layer, norm="rms", prenorm=False) if last else S4Block(layer, norm="batch", d_ff=9)
    encoder = nn.Embedding(7, 6) if last else nn.Linear(3, 6)
    model = S4Model(encoder, [block], nn.Linear(6, 5), norm=nn.LayerNorm(6), pooling=pooling)
    model(inputs(pooling, 4, 20))  # statistics away from (0, 1)
    return model.eval()


def inputs(pooling: str, batch: int, length: int) -> Tensor:
    return torch.randint(7, (batch, length)) if pooling == "last" else torch.randn(batch, length, 3) + 1


def numbers(state: State) -> list[Tensor]:
    return [*state.layers, state.total, state.length]


def follows(model: S4Model, part: str, run: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> None:
    """Three calls in a row equal the model's, outputs and states, for batches of one and of three."""
    start = freeze(model).part(part)
    for batch in (1, 3):
        state, want = start.initial_state(batch), model.initial_state(batch)
        for _ in range(3):
            u = inputs(model.pooling, batch, CHUNK)
            if part == "step":
                u = u[:, 0].contiguous()
                y_want, want = model.step(u, want)
            else:
                y_want, want = model(u, want, return_state=True)
            y, state = run(u, state)
            oracle.close(y, y_want, 1e-5)
            assert [*state] == NAMES
            for got, expected in zip(state.values(), numbers(want), strict=True):
                oracle.close(got, expected, 1e-5)


def session(file: Path) -> Any:
    """Of onnxruntime, on one thread, which reports its errors by exceptions alone."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return runtime.InferenceSession(file, options)


@pytest.mark.promise(
    "s4.deploy", "`.onnx` in onnxruntime: forward at any batch and any length to max_length, to 1e-5"
)
@pytest.mark.parametrize(("pooling", "both"), [("mean", False), ("last", True)])
def test_onnx_forward(pooling: str, both: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = model_of(pooling, both)
    file = export(model, tmp_path / "model.onnx", max_length=LONGEST)
    assert [*tmp_path.iterdir()] == [file]
    run = session(file)
    (given,), (made,) = run.get_inputs(), run.get_outputs()
    assert (given.name, given.shape[:2], made.name) == ("u", ["batch", "length"], "y")
    for batch, length in SHAPES:
        u = inputs(pooling, batch, length)
        oracle.close(torch.from_numpy(run.run(None, {"u": u.numpy()})[0]), model(u), 1e-5, f"{batch, length}")
    with pytest.raises(Exception, match="out of data bounds"):
        run.run(None, {"u": inputs(pooling, 1, LONGEST + 1).numpy()})


@pytest.mark.promise(
    "s4.deploy",
    "`torch.onnx.export` and `torch.jit.trace` of layers that are not frozen: errors that name `s4.deploy`",
    supported=False,
)
def test_layers_are_frozen_for_onnx_and_torchscript(unchecked: None, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    layer, u = S4Layer(4, 8), torch.randn(2, 70, 4)
    with pytest.raises(Exception, match=r"torch\.export") as caught:
        torch.onnx.export(layer, (u,), tmp_path / "x.onnx", dynamo=True, verbose=False)
    assert "s4.deploy.export" in str(caught.value.__cause__)
    for mode in ("fft", "scan", "auto"):
        layer.mode = mode
        with pytest.raises(TypeError, match=r"s4\.deploy\.freeze"):
            torch.jit.trace(layer, (u,))


@pytest.mark.promise(
    "s4.deploy", "`.onnx` in onnxruntime: chunk and step with named states in and out, to 1e-5"
)
@pytest.mark.parametrize(("part", "pooling"), [("chunk", "none"), ("step", "last")])
def test_onnx_streams(part: str, pooling: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = model_of(pooling)
    run = session(export(model, tmp_path / "model.onnx", part, chunk=CHUNK))
    assert [i.name for i in run.get_inputs()] == ["u", *NAMES]
    assert [i.name for i in run.get_outputs()] == ["y", *(f"next_{name}" for name in NAMES)]
    assert run.get_inputs()[1].shape == ["batch", 6, 8]

    def call(u: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        given = {name: t.detach().numpy() for name, t in {"u": u, **state}.items()}
        y, *after = map(torch.from_numpy, run.run(None, given))
        return y, dict(zip(NAMES, after, strict=True))

    follows(model, part, call)


@pytest.mark.promise(
    "s4.deploy", "mode='fft' in `torch.onnx.export`: onnxruntime's transforms are inexact", supported=False
)
def test_transforms_do_not_go_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    frozen = freeze(S4Layer(4, 8), 20)
    with pytest.raises(Exception, match="mode='scan'"):
        torch.onnx.export(frozen, (torch.randn(2, 20, 4),), tmp_path / "x.onnx", dynamo=True, verbose=False)


WITHOUT = """
import sys
sys.modules["s4"] = None  # every import of it raises
import torch
inputs, wanted = torch.load(sys.argv[1])
forward, chunk, step = (torch.export.load(file).module() for file in sys.argv[2:])
results = [forward(u) for u in inputs]
state = {name: t.new_zeros(3, *t.shape[1:]) for name, t in
         torch.export.load(sys.argv[3]).example_inputs[0][1].items()}
y, state = chunk(inputs[0][:, :16].contiguous(), state)
results.append(y)
y, state = step(inputs[0][:, 16].contiguous(), state)
results += [y, *state.values()]
for got, want in zip(results, wanted, strict=True):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max(), (got, want)
try:
    forward(torch.zeros(1, 151, 3))
except Exception as error:
    print(error)
"""


@pytest.mark.promise(
    "s4.deploy", "`.pt2`: loaded and run by a process that has no s4; a longer sequence raises there"
)
def test_program_without_s4(tmp_path: Path) -> None:
    model = model_of("mean")
    u = [inputs("mean", batch, length) for batch, length in [(3, 50), (1, 1), (2, LONGEST)]]
    with torch.no_grad():
        y, state = model(u[0][:, :16], return_state=True)
        wanted = [*(model(each) for each in u), y]
        y, state = model.step(u[0][:, 16], state)
    torch.save((u, [*wanted, y, *numbers(state)]), tmp_path / "tensors.pt")
    files = [
        export(model, tmp_path / "forward.pt2", max_length=LONGEST),
        export(model, tmp_path / "chunk.pt2", "chunk", chunk=16),
        export(model, tmp_path / "step.pt2", "step"),
    ]
    assert "150" in printed(process(WITHOUT, str(tmp_path / "tensors.pt"), *map(str, files)))


def test_other_shapes_of_files(tmp_path: Path) -> None:
    """One step at most; a layer; a module of somebody's own, whose example says what it takes."""
    layer = S4Layer(4, 8, bidirectional=True).double()
    run = torch.export.load(export(layer, tmp_path / "a.pt2", max_length=1)).module()
    u = torch.randn(3, 1, 4).double()
    oracle.close(run(u), layer(u), 1e-9)
    own = nn.Sequential(nn.Tanh(), S4Layer(4, 8))
    file = export(own, tmp_path / "b.pt2", max_length=40, example=torch.zeros(1, 1, 4))
    u = torch.randn(3, 33, 4)
    oracle.close(torch.export.load(file).module()(u), own(u), 1e-5)
    block = S4Block(S4Layer(4, 8, dt_min=0.01))
    file = export(freeze(block, chunk=5, rate=2.0), tmp_path / "c.pt2", "chunk")
    y, state = torch.export.load(file).module()(u[:, :5].contiguous(), {"state_0": block.initial_state(3)})
    want, after = block(u[:, :5], rate=2.0, return_state=True)
    oracle.close(y, want, 1e-5)
    oracle.close(state["state_0"], after, 1e-5)


@pytest.mark.promise(
    "s4.deploy", "TorchScript: a trace of forward, chunk or step serves other batches and lengths"
)
def test_trace(tmp_path: Path) -> None:
    model = model_of("mean")
    for mode in ("fft", "scan"):
        part = freeze(model, LONGEST, mode=mode).part("forward")
        with pytest.warns(torch.jit.TracerWarning):  # the checks of shapes
            torch.jit.trace(part, inputs("mean", 2, 20), check_trace=False).save(tmp_path / "trace.pt")
        run = torch.jit.load(tmp_path / "trace.pt")
        for batch, length in SHAPES:
            u = inputs("mean", batch, length)
            oracle.close(run(u), model(u), 1e-5, f"{batch, length}")
    for name in ("chunk", "step"):
        part = freeze(model, chunk=CHUNK).part(name)
        u = inputs("mean", 2, CHUNK)
        given = u if name == "chunk" else u[:, 0], part.initial_state(2)
        with pytest.warns(torch.jit.TracerWarning):
            traced = torch.jit.trace(part, given, strict=False, check_trace=False)
        follows(model, name, traced)


@pytest.mark.promise(
    "s4.deploy", "torchao: linear layers around frozen ones with int8 weights, outputs within 2%"
)
def test_int8_weights() -> None:
    """A weight is off by at most 1/254 of its row's largest; a result by less than 2% of the largest."""
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of("none")
    frozen = freeze(model, LONGEST, chunk=CHUNK)
    exact = frozen(u := inputs("none", 4, 100))
    quantization.quantize_(frozen, quantization.Int8WeightOnlyConfig())
    linear = [part for part in frozen.modules() if isinstance(part, nn.Linear)]
    assert linear
    assert all(type(part.weight) is not nn.Parameter for part in linear)
    y = frozen(u)
    assert not torch.equal(y, exact)
    oracle.close(y, model(u), 0.02)
    state = frozen.initial_state(4)
    got, _ = frozen.chunk(u[:, :CHUNK], state)
    oracle.close(got, model(u[:, :CHUNK]), 0.02)
    got, _ = frozen.step(u[:, 0], state)
    oracle.close(got, model(u[:, :1])[:, 0], 0.02)


def compiles() -> bool:
    """Whether there is a C++ compiler, as AOTInductor needs one."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    return bool(found) and subprocess.run([found, "--version"], capture_output=True).returncode == 0


@pytest.mark.promise(
    "s4.deploy", "AOTInductor: a package of the `.pt2` equals the model to 1e-5, any batch and length"
)
@pytest.mark.skipif(not compiles(), reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("part", ["forward", "chunk"])
def test_aot_inductor(part: str, tmp_path: Path) -> None:
    model = S4Layer(3, 8, bidirectional=True) if part == "forward" else model_of("none")
    lengths = {"max_length": LONGEST} if part == "forward" else {"chunk": CHUNK}
    program = torch.export.load(export(model, tmp_path / "model.pt2", part, **lengths))
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "package.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    run = torch._inductor.aoti_load_package(package)
    if part == "chunk":
        follows(model, part, run)
    else:
        for batch, length in SHAPES:
            u = inputs("mean", batch, length)
            oracle.close(run(u), model(u), 1e-5, f"{batch, length}")
