"""One thread a worker, as the cases are small and xdist already fills the cores; one seed a test."""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)


class Unchecked(PathFinder):
    """Imports as it is what jaxtyping cannot check.

    The Triton kernels: on Python 3.10 it checks also what asks not to be. A config of transformers: it knows
    the fields of a dataclass alone.
    """

    modules = ("s4.backends.triton.kernels", "s4.transformers.config")

    @classmethod
    def find_spec(cls, fullname: str, *arguments: Any) -> ModuleSpec | None:
        """Of these modules; None leaves the others to jaxtyping."""
        return super().find_spec(fullname, *arguments) if fullname in cls.modules else None


sys.meta_path.insert(0, Unchecked)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none"))


def pytest_collection_finish() -> None:
    """The libraries and tests that are loaded stay: each search for garbage would go through them all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def gpu_that_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    """A failed kernel shows in its own test; a worker whose GPU is lost ends, and xdist starts another."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(3)
            raise


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # two on a busy core wait for each other, in all tests of a process that follow


@pytest.fixture
def still() -> Iterator[None]:
    """Without gradients."""
    with torch.no_grad():
        yield


@pytest.fixture(params=["fused", "plain"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C++ extension, and as where it could not be built."""
    from s4.backends import cpu

    if request.param == "plain":
        monkeypatch.setattr(cpu, "_library", lambda: "not built")
    elif isinstance(reason := cpu._library(), str):
        pytest.skip(reason)


@pytest.fixture(params=["whole", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan of all channels at once, and of one at a time, as on a CPU when there are many."""
    from s4.ops import scan

    if request.param == "blocks":
        monkeypatch.setattr(scan, "_BLOCK", 1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The library as its users run it, without the shape checks that pytest installs."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A device without float64: see no_float64.py. All that it ran, torch has written for Apple's MPS."""
    from no_float64 import device_without_float64, unwritten

    with device_without_float64(monkeypatch) as device:
        yield device
    assert unwritten(device.ran) == []


@pytest.fixture(params=["base", "v3", "v4"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this processor and this build have, up to S4_LEVEL."""
    from s4.backends import cpu

    if request.param not in cpu.levels() or request.param > cpu.level():
        pytest.skip(f"no {request.param} here")
    library = cpu._load(request.param)
    monkeypatch.setattr(cpu, "_library", lambda: library)
    assert cpu.level() == request.param
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of parquet files for each data set that is not embedded."""
    from data import images
    from example_files import write_parquet

    root = tmp_path_factory.mktemp("data")
    return {name: write_parquet(root / name, images.SOURCES[name]) for name in ("mnist", "cifar10")}


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and caches stay within the test."""
    from data import base

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "default_cache", lambda: tmp_path / "cache")


@pytest.fixture
def brief_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs make the parser of their own command alone and plot nothing; both take longer than they train."""
    from trainer import cli

    commands, run_recipe = cli.ExampleCLI.subcommands(), cli.run_recipe

    def run(command: str, *arguments: Any) -> Any:
        one = {command: commands[command]}
        monkeypatch.setattr(cli.ExampleCLI, "subcommands", staticmethod(lambda: one))
        return run_recipe(command, *arguments)

    monkeypatch.setattr(cli, "run_recipe", run)
    monkeypatch.setattr(cli, "learning_curve", lambda folder: None)
