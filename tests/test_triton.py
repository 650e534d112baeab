"""The Triton backend without a GPU: interpreted in a process of its own, and compiled for GPUs elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

from s4.kernel import _triton


def test_without_triton_the_reason_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 's4-pytorch[triton]'" in str(_triton.status(torch.device("cuda")))


def test_without_a_gpu_the_reason_is_one() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "GPU" in str(_triton.status(torch.device("cuda")))


def test_importing_the_library_imports_no_kernels() -> None:
    code = "import sys, s4, s4.kernel; s4.S4Layer(2); sys.exit('s4.kernel._triton_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_sums_as_interpreted() -> None:
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("Triton before 3.7 does not interpret with numpy 2.4 or newer")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "triton_interpreted.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("complex_dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    ("capability", "rows"), [(80, 4), (90, 1), (90, 2), (90, 4), (90, 8), (100, 4)], ids=str
)
def test_every_kernel_compiles_without_spills(
    capability: int,
    rows: int,
    complex_dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the tiles that the backend takes for so many rows, by the assembler that comes with Triton."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set, nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from s4.kernel import _triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    number = "*fp32" if complex_dtype == torch.complex64 else "*fp64"
    launched = {}

    def compile_instead(name: str, programs: int, tensors: list, sizes: list, **tiles: int) -> None:
        function = getattr(_triton_kernels, name)
        constants = {**tiles, "BLOCK": _triton._BLOCK}
        kinds = [*(len(tensors) * [number]), *(len(sizes) * ["i32"]), *(len(constants) * ["constexpr"])]
        source = ASTSource(
            function,
            dict(zip(function.arg_names, kinds, strict=True)),
            constants,
            {(i,): [["tt.divisibility", 16]] for i in range(len(tensors))},
        )
        options = {"num_warps": _triton._WARPS, "enable_fp_fusion": True}
        launched[name] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    monkeypatch.setattr(_triton, "_launch", compile_instead)
    v, w = torch.ones(1, rows, 3, dtype=complex_dtype), torch.ones(1, 3, dtype=complex_dtype)
    grad = _triton.cauchy(v, w, w)
    _triton.cauchy_backward(grad, v, w, w, True)
    _triton.vandermonde_backward(_triton.vandermonde(v, w, 5), v, w)
    assert len(launched) == 5
    for name, kernel in launched.items():
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        report = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        assert re.search(r"STACK:0 .*LOCAL:0 ", report), f"{name} spills: {report}"
