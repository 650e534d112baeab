"""Backend "keops": its cache, shared and broken, and why it may not run."""

import os
import sys
from pathlib import Path

import pytest
import torch
from processes import printed, process

import s4
from s4.backends import keops
from s4.kernel import backends

RACE = """
import os, sys, threading
import torch
from s4.kernel import cauchy
device, name = sys.argv[1], "keops"
v, z, w = (torch.randn(2, 3, dtype=torch.complex128, device=device) for _ in range(3))
start, found = threading.Barrier(2), []

def work():
    start.wait()
    found.append(cauchy(v, z + 3, w, name))

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for got in found:
    torch.testing.assert_close(got, cauchy(v, z + 3, w, "naive"))
import keopscore, pykeops  # whose verbosity is for others to set
for module, variable in ((keopscore, "KEOPS_VERBOSE"), (pykeops, "PYKEOPS_VERBOSE")):
    assert module.verbose == (os.environ.get(variable) != "0")
print(len(found))
"""
PROBE = "import s4; print(s4.kernel.backends()['keops'])"


RUNS = [  # the devices that it can run on
    pytest.param(device, marks=marks)
    for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    if keops.status(torch.device(device)) is True
]


@pytest.mark.parametrize("device", RUNS)
def test_two_threads_of_two_processes_share_a_cold_cache(device: str, tmp_path: Path) -> None:
    """Nothing is compiled twice, and nothing else printed."""
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {log}\nexec {os.environ.get("CXX", "g++")} "$@"\n')
    compiler.chmod(0o700)
    folder = {"KEOPS_CACHE_FOLDER": str(tmp_path / "cache"), "CXX": str(compiler)}
    running = [
        process(RACE, device, **folder, **environment)
        for environment in ({}, {"KEOPS_VERBOSE": "0", "PYKEOPS_VERBOSE": "0"})
    ]
    assert [printed(one) for one in running] == ["2", "2"]
    compiled = log.read_text().splitlines() if log.exists() else []
    assert len(compiled) == len(set(compiled))
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("device", RUNS)
@pytest.mark.parametrize("fault", ["read-only", "under a file"])
def test_a_cache_folder_that_cannot_be_written_is_a_reason(device: str, fault: str, tmp_path: Path) -> None:
    if fault == "read-only":
        tmp_path.chmod(0o500)
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write to read-only folders")
    else:
        (tmp_path / "file").touch()
        tmp_path = tmp_path / "file" / "cache"
    reason = printed(process(PROBE, KEOPS_CACHE_FOLDER=str(tmp_path)))
    assert str(tmp_path) in reason
    assert "KEOPS_CACHE_FOLDER" in reason


@pytest.mark.skipif(not RUNS, reason="KeOps does not run here")
def test_no_compiler_is_a_reason(tmp_path: Path) -> None:
    reason = printed(process(PROBE, KEOPS_CACHE_FOLDER=str(tmp_path), CXX="false"))
    assert "cannot compile" in reason
    assert "CXX" in reason


def test_keops_that_crashes_is_a_reason_and_takes_no_process_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho '  File \"nvrtc.py\", line 78' >&2\nkill -SEGV $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    reason = keops._crash("cuda")
    assert (
        reason == 'KeOps ends the process with SIGSEGV when it compiles for cuda (File "nvrtc.py", line 78)'
    )


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keops.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(keops, "_probe", keops._probe.__wrapped__)
    assert backends()["keops"] == 'needs pykeops: pip install "s4-pytorch[keops]"'
    with pytest.raises(ValueError, match=r"backend 'keops' cannot run: needs pykeops: pip install"):
        s4.S4Layer(4, 8, backend="keops")
    assert all(backends()["torch"].values())
