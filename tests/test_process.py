"""What needs a process of its own: peak memory, and what the shape-checking hook would get in the way of."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s4.backends import BACKENDS

ROOT = Path(__file__).parents[1]
BOUNDED = [
    name
    for name, module in BACKENDS.items()
    if name != "naive" and module.status(torch.device("cpu")) is True
]


def run(program: str, *arguments: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, *arguments, *(["-c", program] if program else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


COMPILE = """
import os, shutil, subprocess
import torch
from s4 import S4Block, S4Layer, S4Model, State
torch.manual_seed(0)
u, x = torch.randn(2, 9, 4), torch.randn(2, 4, 8)

def check(f, *arguments, backend="aot_eager", **keywords):
    got = torch.compile(f, fullgraph=True, backend=backend)(*arguments, **keywords)
    torch.testing.assert_close(got, f(*arguments, **keywords), rtol=1e-4, atol=1e-5)

for variant in ("dplr", "diag"):
    check(S4Layer(4, 8, variant=variant).step, u[:, 0], x)
block = S4Block(S4Layer(4, 8), norm="batch")
block(3 * u + 1)  # statistics away from (0, 1)
check(block, u, lengths=torch.tensor([3, 9]))
check(block.eval(), u, lengths=torch.tensor([3, 9]))
model = S4Model(torch.nn.Linear(4, 4), [S4Block(S4Layer(4, 8))], torch.nn.Linear(4, 2), pooling="mean")
with torch.no_grad():
    check(lambda u, state: tuple(model.step(u, state)[0:1]), u[:, 0], model.initial_state(2))
    state = model(u, return_state=True)[1]
    check(lambda state: State.cat([state.select([1, 0, 0]), state.reset([1]).detach().clone()]), state)
    check(lambda state, new: model.step(u[:, 0], state.reset(new)), state, torch.tensor([True, False]))
    compiler = shutil.which(os.environ.get("CXX", "g++"))  # the default backend generates code for one
    if compiler and subprocess.run([compiler, "--version"], capture_output=True).returncode == 0:
        torch._inductor.config.fx_graph_cache = False  # which knows no ATEN_CPU_CAPABILITY
        check(S4Layer(4, 8).step, u[:, 0], x, backend="inductor")
"""


@pytest.mark.promise(
    "torch.compile",
    "`fullgraph=True` of layer, block and model: forward, `step`, a `State` in and out and its methods",
)
def test_step_and_forward_compile_to_one_graph() -> None:
    run(COMPILE)


MEMORY = """
import os, sys, torch
import s4.kernel
from s4 import S4Layer
torch.manual_seed(0)

def used(what):  # not getrusage, whose peak starts at that of the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024

def kernel(L, variant):
    return S4Layer(128, 64, variant=variant).kernel(L)

def vandermonde(L, _):
    v, x = torch.randn(2, 128, 32, dtype=torch.complex64)
    return s4.kernel.vandermonde(v.requires_grad_(), (x / 100 - 1).requires_grad_(), L)

def cauchy(L, backend):
    v, w = torch.randn(2, 128, 32, dtype=torch.complex64)
    z = torch.randn(L, dtype=torch.complex64) + 9
    return s4.kernel.cauchy(v.requires_grad_(), z, w.requires_grad_(), backend=backend).abs()

for case in sys.argv[1:]:
    if os.fork() == 0:  # with a peak of its own, and nothing computed before
        name, option = case.split(":")
        call = globals()[name]
        call(64, option).sum().backward()  # libraries loaded, thread pools up
        start = used('VmRSS')
        call(16384, option).square().sum().backward()
        print(case, used('VmHWM') - start, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident set from /proc")
def test_memory_has_no_term_in_all_three_sizes() -> None:
    """Forward and backward at (H, N, L) = (128, 64, 16384), where H L N/2 complex64 numbers take 512 MiB."""
    cases = ["kernel:dplr", "kernel:diag", "vandermonde:", *(f"cauchy:{backend}" for backend in BOUNDED)]
    used = dict(line.split() for line in run("", "-c", MEMORY, *cases).splitlines())
    assert list(used) == cases
    assert {case: mebibytes for case, mebibytes in used.items() if not 0 < float(mebibytes) < 300} == {}


def test_a_stream_builds_no_graph_and_leaves_gradients_on() -> None:
    """The hook would hide from torch.no_grad that `stream` is a generator."""
    run("""
import torch
from s4 import S4Block, S4Layer, S4Model
model = S4Model(torch.nn.Linear(3, 4), [S4Block(S4Layer(4, 8))], torch.nn.Linear(4, 3)).eval()
stream = model.stream(torch.randn(2, 5, 3), lambda y: y)
for _ in range(3):
    assert not next(stream).requires_grad
    assert torch.is_grad_enabled()
""")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident set from /proc")
def test_generation_holds_one_state_however_long() -> None:
    """Four thousand steps, each with a state of 128 KiB: if they stayed, it would show."""
    grown = run("""
import resource
import torch
from s4 import S4Block, S4Layer, S4Model
model = S4Model(torch.nn.Linear(1, 8), [S4Block(S4Layer(8, 64))], torch.nn.Linear(8, 1)).eval()
stream = model.stream(torch.randn(64, 2, 1), torch.tanh, stop=lambda y: y[:, 0] > 1)
for step, _ in zip(range(4000), stream):
    if step == 200:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
""")
    assert float(grown) < 50


def test_info_lists_every_backend() -> None:
    import s4.kernel

    text = run("", "-m", "s4.info")
    assert all(name in text for name in ("torch", "python", *s4.kernel.backends()))


def test_import_is_quiet() -> None:
    """Nothing printed, and nothing loaded before it is asked for: no optional library, not the compiler.

    But for triton, which torch loads itself with its counter of operations, where formulas are registered.
    """
    out = run("""
import sys
import s4
optional = ("pykeops", "lightning", "matplotlib", "scipy", "torch._dynamo")
print([name for name in optional if name in sys.modules])
""")
    assert out.strip() == "[]"


WITHOUT_NUMPY = """
import sys, warnings
sys.modules["numpy"] = None  # every import of it raises
import torch
torch.tensor([0.0])  # by now torch has said that it misses it
warnings.simplefilter("error")
import s4, s4.info
from s4 import S4Block, S4Layer, S4Model, State, categorical, param_groups
u = torch.randn(2, 9, 4)
for mode in ("fft", "scan"):
    for variant, both in (("dplr", False), ("diag", False), ("dplr", True)):
        layer = S4Layer(4, 8, variant=variant, mode=mode, bidirectional=both)
        layer(u, lengths=torch.tensor([9, 3])).sum().backward()
        layer.kernel(5), layer.dense()
        if not both:
            y, state = layer(u, return_state=True)
            layer.step(u[:, 0], state)
model = S4Model(torch.nn.Embedding(7, 4), [S4Block(S4Layer(4, 8))], torch.nn.Linear(4, 7))
torch.optim.AdamW(param_groups(model, 0.01))
prompt = torch.zeros(2, 3, dtype=torch.long)
print(tuple(model.eval().generate(prompt, 5, categorical()).shape))
state = model.initial_state(2)
State.cat([state.select([0, 1]), state.reset([True, False])])
"""


def test_numpy_is_not_needed() -> None:
    assert run(WITHOUT_NUMPY).strip() == "(2, 5)"


def test_suite_is_collected_without_the_examples_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tests are skipped, the others are there."""
    (tmp_path / "lightning.py").write_text("raise ModuleNotFoundError('no lightning', name='lightning')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tests = [*(ROOT / "tests").glob("test_*.py")]
    folders = "|".join(f.name for f in (ROOT / "examples").iterdir() if f.is_dir())
    needy = [
        t for t in tests if re.search(rf"^(from|import) ({folders}|example)", t.read_text(), re.MULTILINE)
    ]
    files = map(str, [*needy, ROOT / "tests" / "test_layer.py"])
    collected = run("", "-m", "pytest", "--collect-only", "-q", "--rootdir", str(ROOT), *files)
    assert "test_layer.py" in collected
    assert "test_training.py" not in collected
