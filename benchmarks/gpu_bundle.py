"""Wheels and data for `make gpu` on a machine without a network: `make gpu-bundle DATA=folder`.

Finds what the test suite and the examples need and the machine's image lacks, by the list of what it has;
takes their wheels for the machine's Python on x86-64 Linux, this project's own, built here with its C++
library, and the data; and lists what it took. There: make gpu WHEELS=build/gpu-bundle.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from make_gpu.environment import ROOT, digest, normal, requirements

try:
    from packaging.requirements import Requirement
except ImportError:  # a Python with nothing but pip
    from pip._vendor.packaging.requirements import Requirement

SOURCE_ONLY = ("pykeops", "keopscore")  # published without wheels; pure Python, so that one built here fits
MOST_MB = 60.0


def pip(*arguments: str) -> str:
    """What it prints; it ends the program where it fails."""
    command = [sys.executable, "-m", "pip", *arguments]
    print(f"pip {' '.join(arguments)}", flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout


def image(file: Path) -> dict[str, str]:
    """Names and versions, or none, of what the machine has."""
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines) if name}


def take(has: dict[str, str], python: str, folder: Path) -> None:
    """Wheels of all that the test extra needs beyond the image, and of what they need in turn.

    Raises:
        SystemExit: the image has a version that one of them cannot take.
    """
    for name in SOURCE_ONLY:
        if name not in has:
            pip("wheel", "-q", "--no-deps", "-w", str(folder), name)
    open_ends = [Requirement(text) for text in requirements("test").values()]
    taken: dict[str, str] = {}
    while open_ends:
        need = open_ends.pop()
        name = normal(need.name)
        version = taken.get(name) or has.get(name, "")
        if version and not need.specifier.contains(version, prereleases=True):
            raise SystemExit(f"{need} is needed, but the machine has or gets {version}: see --image")
        if name in has or (name in taken and not need.extras):
            continue
        if name not in taken:
            pip("download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", python,
                "--find-links", str(folder), "-d", str(folder), str(need))  # fmt: skip
        wheel = next(w for w in folder.glob("*.whl") if normal(w.name.split("-")[0]) == name)
        taken[name] = wheel.name.split("-")[1]
        with zipfile.ZipFile(wheel) as content:
            file = next(f for f in content.namelist() if f.endswith(".dist-info/METADATA"))
            metadata = HeaderParser().parsestr(content.read(file).decode())
        machine = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
        for text in metadata.get_all("Requires-Dist", []):
            inner = Requirement(text)
            marker = inner.marker
            if marker is None or any(marker.evaluate({**machine, "extra": e}) for e in ("", *need.extras)):
                inner.marker = None
                open_ends.append(inner)
    (folder / "requirements.txt").write_text("".join(f"{n}=={v}\n" for n, v in sorted(taken.items())))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = ROOT / "build" / "gpu-bundle"
    parser.add_argument("--out", type=Path, default=out, help="folder, made anew: build/gpu-bundle (OUT)")
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet (DATA)")
    parser.add_argument(
        "--image",
        type=Path,
        default=Path(__file__).parent / "make_gpu" / "image.txt",
        help="what the machine has, as pip list --format=freeze prints it (IMAGE)",
    )
    parser.add_argument("--python-version", default="3.12", help="the machine's: 3.12")
    arguments = parser.parse_args()
    files = [arguments.data / f"{split}.parquet" for split in ("train", "test")] if arguments.data else []
    for path in (arguments.image, *files):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    folder: Path = arguments.out.resolve()
    if folder.exists() and not (folder / "sources.txt").is_file() and any(folder.iterdir()):
        parser.error(f"--out: {folder} holds something else than a bundle")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    (folder / "sources.txt").write_text(f"{digest()} {commit or 'unknown'}\n")
    has = image(arguments.image)
    pip("wheel", "-q", "--no-deps", "-w", str(folder), ".")
    take(has, arguments.python_version, folder)
    if files:
        (folder / "data").mkdir()
        for path in files:
            shutil.copy(path, folder / "data")
    total = 0.0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total += path.stat().st_size / 1e6
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.relative_to(folder)}")
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    print(f"{total:8.2f} MB  for make gpu WHEELS={shown}")
    if total > MOST_MB:
        raise SystemExit(f"over {MOST_MB:g} MB: name more of what the machine has in --image")


if __name__ == "__main__":
    main()
