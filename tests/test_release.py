"""The release script and what its wheels are named by."""

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from s4.backends import cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`.ci/release.py`, at work in an empty folder."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_a_version_is_written_into_every_file_that_has_it(release: ModuleType, tmp_path: Path) -> None:
    named = ["s4/version.py", "CITATION.cff", "docs/api/commands.md", "docs/install.md"]
    for name in named:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "CHANGELOG.md").write_text("# C\n\n## [Unreleased]\n\n- x\n\n## [0.1.0] - 2026-01-01\n")
    assert release.rename("7.8.9") == [*named, "CHANGELOG.md"]
    date = release.datetime.date.today().isoformat()
    lines = [
        '__version__ = "7.8.9"',
        f'version: 7.8.9\ndate-released: "{date}"\n',
        "s4       7.8.9 in ",
        "-7.8.9-",
    ]
    for name, line in zip(named, lines, strict=True):
        assert (tmp_path / name).read_text().count(line) == 1
    notes = f"# C\n\n## [Unreleased]\n\n## [7.8.9] - {date}\n\n- x\n\n## [0.1.0] - 2026-01-01\n"
    assert (tmp_path / "CHANGELOG.md").read_text() == notes
    with pytest.raises(SystemExit, match="nothing under Unreleased"):
        release.rename("8.0.0")


def test_the_changelog_here_can_be_released(release: ModuleType) -> None:
    head = "## [Unreleased]\n"  # which a release leaves empty
    text = (ROOT / "CHANGELOG.md").read_text().replace(head, f"{head}\n- A change.\n\n")
    assert f"{head}\n## [99.0.0] - today\n\n- A change.\n" in release.release_notes(text, "99.0.0", "today")


def test_a_release_that_fails_leaves_no_trace(
    release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the commit was made and the tag could not be."""
    real = release.run

    def run(*command: str) -> str:
        if "-a" in command:
            raise SystemExit("no tag")
        who = ("-c", "user.name=s4", "-c", "user.email=s4@example.org")
        return real("git", *who, *command[1:], cwd=tmp_path) if command[0] == "git" else ""

    def rename(version: str) -> list[str]:
        file.write_text(version)
        return ["file"]

    file = tmp_path / "file"
    file.write_text("before")
    for command in (("init", "-q"), ("add", "file"), ("commit", "-qm", "first")):
        run("git", *command)
    (tmp_path / ".git" / "info" / "exclude").write_text("dist\n")
    (tmp_path / "dist").mkdir()
    stand_ins = {"run": run, "rename": rename, "build": lambda *_: tmp_path / "dist" / "s4.whl"}
    stand_ins |= {"contents": lambda *_: [], "symbols": lambda *_: [], "smoke": lambda *_: None}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(release, name, stand_in)
    monkeypatch.setattr("sys.argv", ["release.py", "--version", "9.9.9", "--out", str(tmp_path / "dist")])
    with pytest.raises(SystemExit, match="no tag"):
        release.main()
    assert file.read_text() == "before"
    assert run("git", "log", "--format=%s") == "first\n"


def test_a_folder_with_other_files_is_not_emptied(release: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "s4-0-py3-none-any.whl").touch()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="but has thesis"):
        release.emptied(tmp_path)
    (tmp_path / "thesis.tex").unlink()
    release.emptied(tmp_path)
    assert not tmp_path.exists()


def test_a_wheel_has_what_it_needs_and_no_more(release: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "s4_pytorch-1-py3-none-any.whl"
    names = [f"s4/backends/cpu/_native_{level}.so" for level in ("base", "v3", "v4")]
    names += [
        "s4/py.typed",
        "s4/backends/cuda/kernels.cu",
        "s4/layer.py",
        "s4_pytorch-1.dist-info/METADATA",
        "s4/",
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    assert release.contents(wheel, "x86_64") == []
    assert release.contents(wheel, "aarch64") == [f"{name} is too much" for name in names[1:3]]
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("s4/backends/cpu/scan.h", "")
    assert release.contents(wheel, "x86_64") == ["s4/backends/cpu/scan.h is too much"]
    other = wheel.rename(tmp_path / "s4_pytorch-1-cp311-cp311-linux_x86_64.whl")
    assert "is not for every Python" in release.contents(other, "x86_64")[0]


def test_libraries_that_ask_for_too_much_are_named(release: ModuleType, tmp_path: Path, monkeypatch) -> None:
    """Those here, by the compiler of this machine, where nothing is allowed."""
    pytest.importorskip("elftools")
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(Path(cpu._file("base") or ""), "base.so")
    monkeypatch.setattr(release, "GLIBC", (2, 1))
    monkeypatch.setattr(release, "NEEDS", {"libc.so.6"})
    wrong = release.symbols(wheel)
    assert any("base.so needs GLIBC_2." in each for each in wrong)
    assert "base.so needs libm.so.6" in wrong
    assert not any("shows" in each for each in wrong)


def test_a_library_is_found_by_its_own_name_alone() -> None:
    """One of an earlier build, _native_base.abi3.so, may still lie there."""
    for level in cpu.levels():
        file = cpu._file(level)
        assert file is not None
        assert file.name == f"_native_{level}.so"


def test_the_processor_is_asked_for_what_the_libraries_need() -> None:
    """Beside what the system says of it."""
    base, cpuinfo = cpu._load("base"), Path("/proc/cpuinfo")
    if isinstance(base, str) or not cpuinfo.is_file() or " avx " not in cpuinfo.read_text():
        pytest.skip("no library, or no such processor")
    line = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split())
    best = "base"
    if {"avx2", "fma"} <= flags:
        best = "v4" if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags else "v3"
    assert base.s4_processor().decode() == best
