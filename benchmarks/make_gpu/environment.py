"""The environment of `make gpu`: found, completed from wheels or by pip, and with the C++ library.

Python's standard library alone, as it runs before anything is installed.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ROOT / "build" / "gpu"
INSTALL_LIMIT = 900.0  # seconds, where torch has to be downloaded; with wheels it takes a few


class SetupError(Exception):
    """There is no environment to run in; the message says what to do."""


def environment(device: str, wheels: Path | None) -> tuple[str, dict[str, str]]:
    """A Python with all that the parts import, and the variables to run it with.

    Raises:
        SetupError: there is none.
    """
    python, found = _python(device, wheels)
    print(f"torch    {found} in {python}", flush=True)
    paths = [str(ROOT), str(ROOT / "benchmarks")]
    if wheels:
        site = SCRATCH / "site"
        _unpack(python, wheels, site)
        paths.append(str(site))
    # Threads that wait do not spin: they would take the cores of those that work.
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg", "OMP_WAIT_POLICY": "PASSIVE"}
    variables["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    if missing := _missing(python, variables):
        if wheels:
            print(f"missing  {', '.join(missing)}: neither here nor in {wheels}", flush=True)
        else:
            _pip(python, "install", "-q", "-e", f"{ROOT}[test]")
    if device == "cuda":
        variables |= _cuda_libraries(python, variables)
        # Else each of several workers starts as many as there are cores.
        variables["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    print(f"C++      {_extension(python, wheels, variables)}", flush=True)
    if commit := _commit(wheels):
        variables["S4_COMMIT"] = commit
    return python, variables


def _cuda_libraries(python: str, variables: dict[str, str]) -> dict[str, str]:
    """Variables by which KeOps finds NVRTC as it looks for it: libnvrtc.so, of the version that torch has.

    pip's packages have no file of that name, and the system's may be of another version than torch's.
    """
    code = "import importlib.util as u; print(*(u.find_spec('nvidia').submodule_search_locations))"
    homes = [Path(home) for home in _output([python, "-c", code], variables).split()]
    found = [f for home in homes for f in sorted(home.rglob("libnvrtc.so.*")) if "alt" not in f.name]
    if not found:
        return {}
    links = SCRATCH / "lib"
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir(parents=True)
    for name in ("libnvrtc.so", found[0].name):
        (links / name).symlink_to(found[0])
    compiler = _shared_standard_library(python, variables, links)
    folders = [str(links), str(found[0].parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    toolkit = {} if Path("/usr/local/cuda/include").is_dir() else {"CUDA_PATH": str(found[0].parent.parent)}
    return {"LD_LIBRARY_PATH": os.pathsep.join(folders), **toolkit, **compiler}


def _shared_standard_library(python: str, variables: dict[str, str], links: Path) -> dict[str, str]:
    """CXX that links torch's libstdc++.so.6, where the compiler has the static one alone.

    What KeOps compiles would hold a second copy, and crash in it: seen with a g++ without libstdc++.so.
    """
    gxx = shutil.which(variables.get("CXX") or "g++")
    if gxx is None or os.path.isabs(_output([gxx, "-print-file-name=libstdc++.so"], variables)):
        return {}
    code = "import torch; print(*{x.split()[-1] for x in open('/proc/self/maps') if 'libstdc++.so' in x})"
    loaded = _output([python, "-c", code], variables).split()
    if not loaded:
        return {}
    (links / "libstdc++.so").symlink_to(loaded[0])
    wrapper = links / "g++"
    wrapper.write_text(f'#!/bin/sh\nexec {gxx} -L{links} "$@"\n')
    wrapper.chmod(0o755)
    return {"CXX": str(wrapper)}


def _python(device: str, wheels: Path | None) -> tuple[str, str]:
    """The first Python that has torch for the device, or else .venv, and the version of its torch."""
    own = str(ROOT / ".venv" / "bin" / "python")
    code = "import torch; print(torch.__version__, torch.cuda.is_available(), torch.version.cuda)"
    seen = ""
    for python in dict.fromkeys([sys.executable, shutil.which("python") or own, own]):
        version, *cuda = _output([python, "-c", code], dict(os.environ)).split() or ("",)
        if version and (device == "cpu" or cuda[0] == "True"):
            return python, version
        seen = seen or (version and f"torch {version} of {python} finds no GPU (CUDA {cuda[1]})")
    if device == "cuda" and shutil.which("nvidia-smi") is None:
        raise SetupError(f"no GPU here: {seen or 'there is no nvidia-smi'}; make gpu DEVICE=cpu rehearses")
    if seen or wheels:
        raise SetupError(
            f"{seen or 'no torch in ' + sys.executable}: activate an environment with torch for {device}"
        )
    if not Path(own).exists():
        subprocess.run([sys.executable, "-m", "venv", str(ROOT / ".venv")], check=True)
    _pip(own, "install", "-q", "-e", f"{ROOT}[test]")
    return own, _output([own, "-c", code], dict(os.environ)) or "torch cannot be imported"


def _output(command: list[str], variables: dict[str, str]) -> str:
    """What a command prints, nothing if it fails."""
    try:
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", *arguments]
    print(f"install  {' '.join(command[2:])}", flush=True)
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise SetupError(
            f"pip took over {INSTALL_LIMIT:g} s; run `make test` once, or bring WHEELS"
        ) from None
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
        raise SetupError(f"pip failed; without a network make gpu WHEELS=folder. It said: {said[-1]}")


def _unpack(python: str, wheels: Path, site: Path) -> None:
    """The wheels of what this Python does not have, into a folder: its own packages stay as they are."""
    installed = _installed(python, dict(os.environ))
    chosen = [w for w in sorted(wheels.glob("*.whl")) if normal(w.name.split("-")[0]) not in installed]
    chosen = [w for w in chosen if normal(w.name.split("-")[0]) != "s4-pytorch"]  # run from the tree
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    for wheel in chosen:
        with zipfile.ZipFile(wheel) as content:  # what pip does with one that only holds Python
            content.extractall(site)
    print(f"wheels   {', '.join(w.name.split('-')[0] for w in chosen) or 'nothing is missing'}", flush=True)


def _installed(python: str, variables: dict[str, str]) -> set[str]:
    code = "from importlib.metadata import distributions as d; print(*{str(x.metadata['Name']) for x in d()})"
    return set(map(normal, _output([python, "-c", code], variables).split()))


def _missing(python: str, variables: dict[str, str]) -> list[str]:
    """What the parts need and this Python does not have."""
    return sorted(set(requirements("test")) - _installed(python, variables))


def requirements(extra: str) -> dict[str, str]:
    """What pyproject.toml asks for with an extra, by name, those of its own extras included."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, str] = {}

    def add(listed: Sequence[str]) -> None:
        for requirement in listed:
            name = normal(re.split(r"[\s\[<>=!~;]", requirement)[0])
            if name == "s4-pytorch":
                for inner in re.findall(r"[\w-]+", requirement.split("[")[1].split("]")[0]):
                    add(project["optional-dependencies"][inner])
            else:
                text, _, marker = requirement.partition(";")
                # pyproject.toml has one marker: Linux on x86-64.
                if not marker or (sys.platform, platform.machine()) == ("linux", "x86_64"):
                    found[name] = text.strip()

    add(project["dependencies"])
    add(project["optional-dependencies"][extra])
    return found


def normal(name: str) -> str:
    """The name of a distribution as all of its spellings are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def digest() -> str:
    """Of all that the wheel is built from: whether a wheel's C++ libraries are this tree's."""
    files = [p for p in (ROOT / "s4").rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu")]
    content = hashlib.sha256()
    for path in sorted([*files, ROOT / "setup.py"]):
        content.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return content.hexdigest()


def _commit(wheels: Path | None) -> str:
    """That of the bundle, where the tree has come without its history."""
    if wheels is None or not (wheels / "sources.txt").is_file():
        return ""
    sources, commit = (wheels / "sources.txt").read_text().split()
    return commit if sources == digest() else f"{commit}-changed"


def _extension(python: str, wheels: Path | None, variables: dict[str, str]) -> str:
    """Put the C++ libraries into the tree, and say where they are from."""
    folder = ROOT / "s4" / "backends" / "cpu"
    sources = [*folder.glob("*.cpp"), *folder.glob("*.h")]
    built = [*folder.glob("_native_base.so")]
    if built and min(b.stat().st_mtime for b in built) > max(s.stat().st_mtime for s in sources):
        return "built before"
    own = sorted(wheels.glob("s4_pytorch-*.whl")) if wheels else []
    if own and wheels and not _commit(wheels).endswith("changed"):
        with zipfile.ZipFile(own[-1]) as wheel:
            inside = [name for name in wheel.namelist() if "/_native_" in name]
            wheel.extractall(ROOT, inside)
        if inside:
            return f"from {own[-1].name}"
    began = time.monotonic()
    command = [python, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=INSTALL_LIMIT
        )
    except subprocess.TimeoutExpired:
        return "not built: it took too long"
    if done.returncode or not (folder / "_native_base.so").is_file():
        return f"not built: {(done.stderr.splitlines() or ['no compiler'])[-1]}"
    return f"built in {time.monotonic() - began:.0f} s"
