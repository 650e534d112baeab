"""The binaries of the `cuda` backend: compiled once, kept in a folder, made anew when damaged."""

import multiprocessing
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from s4.backends import cuda


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S4_CACHE_DIR", str(tmp_path / "made" / "here"))
    return tmp_path / "made" / "here"


def refuse() -> bytes:
    raise AssertionError("compiled again")


def test_cache_keeps_a_binary_by_architecture_and_compiler(cache: Path) -> None:
    assert cuda._cubin("sm_90", "one", lambda: b"code") == b"code"
    assert cuda._cubin("sm_90", "one", refuse) == b"code"
    assert cuda._cubin("sm_80", "one", lambda: b"other") == b"other"
    assert cuda._cubin("sm_90", "two", lambda: b"newer") == b"newer"
    assert cuda._cubin("sm_90", "one", refuse) == b"code"
    assert len(list(cache.iterdir())) == 3


def test_cache_follows_the_source(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda._cubin("sm_90", "one", lambda: b"old")
    changed = tmp_path / "kernels.cu"
    changed.write_text(cuda._SOURCE.read_text() + "\n")
    monkeypatch.setattr(cuda, "_SOURCE", changed)
    assert cuda._cubin("sm_90", "one", lambda: b"new") == b"new"


@pytest.mark.parametrize(
    "damage", [b"", b"\x00" * 40, b"codf", None], ids=["empty", "zeros", "a bit", "a folder"]
)
def test_damaged_file_is_made_anew(cache: Path, damage: bytes | None) -> None:
    cuda._cubin("sm_90", "one", lambda: b"code")
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.unlink()
    if damage is None:
        path.mkdir()
    else:
        path.write_bytes(damage + whole[4:] if len(damage) == 4 else damage)
    assert cuda._cubin("sm_90", "one", lambda: b"code") == b"code"
    if damage is not None:
        assert path.read_bytes() == whole
        assert cuda._cubin("sm_90", "one", refuse) == b"code"
    assert list(cache.iterdir()) == [path], "temporary files are left"


def test_read_only_cache_folder_is_no_hindrance(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    if os.access(cache, os.W_OK):  # root may write anywhere: a file in the folder's place stops it as well
        cache.rmdir()
        cache.write_text("")
    assert cuda._cubin("sm_90", "one", lambda: b"code") == b"code"
    assert cuda._cubin("sm_90", "one", lambda: b"again") == b"again"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S4_CACHE_DIR", "/a/b")
    assert cuda._cache_folder() == Path("/a/b")
    monkeypatch.delenv("S4_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cuda._cache_folder() == Path("/c/s4")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cuda._cache_folder() == Path("/home/someone/.cache/s4")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_processes_that_start_together_all_get_the_whole_binary(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)

    def compile() -> bytes:
        together.wait(10)  # so that both have found nothing
        return b"code" * 100_000

    def start() -> None:
        assert cuda._cubin("sm_90", "one", compile) == b"code" * 100_000

    processes = [context.Process(target=start) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert cuda._cubin("sm_90", "one", refuse) == b"code" * 100_000
    assert len(list(cache.iterdir())) == 1


def test_threads_share_one_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = [], []

    class Module:
        def get_kernel(self, name: str) -> str:
            asked.append(name)
            return name

    def module(device: torch.device) -> Module:
        made.append(device)
        gate.wait(0.2)  # while the others arrive
        return Module()

    gate = threading.Event()
    for name, value in [("_module", module), ("_modules", {}), ("_kernels", {})]:
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device, got = torch.device("cuda", 0), []
    threads = [threading.Thread(target=lambda: got.append(cuda._kernel(device, "a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == ["a"] * 4
    assert made == [device]
    cuda._kernel(torch.device("cuda", 1), "a")
    assert len(made) == 2
    # A capture takes what has run, and is told what to do about the rest.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda._kernel(device, "a") == "a"
    with pytest.raises(RuntimeError, match="run the same operation once before the capture"):
        cuda._kernel(device, "b")
