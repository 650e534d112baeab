"""Everything that a GPU has to prove, in a few minutes: `make gpu`.

    make gpu [RESULTS=folder] [WHEELS=folder]           tests, then benchmarks with small budgets
    make gpu TRAIN=1 DATA=folder MINUTES=8              sequential CIFAR-10 for that long, weights kept
    make gpu DEVICE=cpu [HANG=layer] [CRASH=kernels]    a rehearsal with tiny sizes, and what a fault leaves

Each part runs in a process of its own under a time limit, and writes its results as they come: what hangs,
crashes or runs out of memory costs no other part. A table comes last, failures first. Nothing but Python's
standard library is needed to start: the environment is the Python that runs this if that has torch for the
device, or else .venv, made if need be. With WHEELS, a folder of `make gpu-bundle`, nothing is downloaded.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "build" / "gpu"
INSTALL_LIMIT = 900.0  # seconds, where torch has to be downloaded; with wheels it takes a few
GRACE = 10.0  # seconds for a training to save in, between SIGTERM and SIGKILL
ENDING = 40.0  # seconds of a training that its end takes: the test set, files, the start of Python


@dataclass
class Part:
    """A command, how many seconds it may take, and the file that it writes results to."""

    name: str
    command: list[str]
    limit: float
    result: Path
    saves: bool = False  # its output is shown, and it is given time to save when it has to end


@dataclass
class Outcome:
    """How a part ended."""

    name: str
    state: str  # "ok", or what went wrong
    seconds: float
    said: str = ""  # its last line, where something did


class SetupError(Exception):
    """There is no environment to run in; the message says what to do."""


# The environment


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
        # KeOps looks for CUDA's libraries where the loader does, not where pip put those of torch.
        code = "import importlib.util as u; print(*(u.find_spec('nvidia').submodule_search_locations))"
        homes = [Path(home) for home in _output([python, "-c", code], variables).split()]
        folders = [*(f.parent for h in homes for f in h.rglob("libnvrtc.so*")), Path("/usr/local/cuda/lib64")]
        existing = dict.fromkeys(str(folder) for folder in folders if folder.is_dir())
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(
            [*filter(None, [os.environ.get("LD_LIBRARY_PATH")]), *existing]
        )
    print(f"C++      {_extension(python, wheels, variables)}", flush=True)
    if commit := _commit(wheels):
        variables["S4_COMMIT"] = commit
    return python, variables


def _python(device: str, wheels: Path | None) -> tuple[str, str]:
    """The first Python that has torch for the device, or else .venv, and the version of its torch."""
    own = str(ROOT / ".venv" / "bin" / "python")
    code = "import torch; print(torch.__version__, torch.cuda.is_available(), torch.version.cuda)"
    seen = ""
    for python in (sys.executable, own):
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
    if chosen:
        _pip(python, "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site),
             *map(str, chosen))  # fmt: skip


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
                found[name] = requirement.split(";")[0].strip()

    add(project["dependencies"])
    add(project["optional-dependencies"][extra])
    return found


def normal(name: str) -> str:
    """The name of a distribution as all of its spellings are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def digest() -> str:
    """Of all that the wheel is built from: whether a wheel's C++ library is this tree's."""
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
    """Put the C++ library into the tree, and say where it is from."""
    kernel = ROOT / "s4" / "kernel"
    sources = [*kernel.glob("_cpu*.cpp"), *kernel.glob("_cpu*.h")]
    built = [*kernel.glob("_cpu_native*.so")]
    if built and min(b.stat().st_mtime for b in built) > max(s.stat().st_mtime for s in sources):
        return "built before"
    own = sorted(wheels.glob("s4_pytorch-*.whl")) if wheels else []
    if own and wheels and not _commit(wheels).endswith("changed"):
        with zipfile.ZipFile(own[-1]) as wheel:
            inside = [name for name in wheel.namelist() if "_cpu_native" in name]
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
    if done.returncode or not [*kernel.glob("_cpu_native*.so")]:
        return f"not built: {(done.stderr.splitlines() or ['no compiler'])[-1]}"
    return f"built in {time.monotonic() - began:.0f} s"


# The parts


def parts(device: str, python: str, results: Path) -> list[Part]:
    """Tests and benchmarks."""

    def benchmark(name: str, limit: float, budget: float, seconds: float, *more: str) -> Part:
        out = results / f"{name}.json"
        options = ["--device", device, "--budget", f"{budget:g}", "--seconds", f"{seconds:g}"]
        command = [python, f"benchmarks/{name}.py", *options, "--out", str(out), *more]
        return Part(name, command, slack * limit, out)

    record = results / "tests.jsonl"
    pytest = [python, "-m", "pytest", "-q", "--tb=short", "-p", "recorder", "--record", str(record)]
    pytest += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    plain = ["--plots", "false"]
    if device == "cpu":
        tests = [*pytest, "tests/test_devices.py", "-k", "cpu"]
        sizes = [["--widths", "2", "--states", "4", "--lengths", "8"], ["--shapes", "[[2,64,8]]"], [], []]
        sizes[1] += ["--d_state", "4", "--dtypes", "float32,bfloat16"]
        sizes[2] += [
            "--contexts",
            "4",
            "--batches",
            "1",
            "--d_model",
            "64",
            "--n_layers",
            "1",
            "--d_state",
            "4",
        ]
        sizes[3] += ["--recipes", "digits"]
        budget, seconds, train, slack = 40.0, (0.0, 0.0, 0.0, 0.0), [], 4  # a rehearsal is not for its speed
    else:
        tests = [*pytest, "-m", "gpu", "-n", str(min(8, os.cpu_count() or 1))]
        sizes = [["--widths", "512", "--states", "64", "--lengths", "1024,16384"]]
        sizes += [["--shapes", "[[50,512,1024],[16,256,16384]]", "--dtypes", "float32,bfloat16"]]
        sizes += [["--contexts", "1024,16384", "--batches", "1,16"], ["--recipes", "scifar"]]
        budget, seconds, slack = 35.0, (0.15, 0.2, 0.5, 4.0), 1
        train = ["--made", "true"]  # to decode the true images takes as long as to time the model
    return [
        Part("tests", tests, slack * 110, record),
        benchmark("kernels", 65, budget, seconds[0], *sizes[0], *plain),
        benchmark("layer", 65, budget, seconds[1], *sizes[1], *plain),
        benchmark("generation", 45, budget / 2, seconds[2], *sizes[2], *plain),
        benchmark(
            "training", 45, budget, seconds[3], *sizes[3], *train, "--precisions", "32-true,bf16-mixed"
        ),
    ]


def run(part: Part, variables: dict[str, str], log: IO[str], left: float, fault: str = "") -> Outcome:
    """Run a part to its end or its limit; a fault is rehearsed as soon as it has written results."""
    print(f"\n=== {part.name}: {' '.join(part.command)}", file=log, flush=True)
    began, limit = time.monotonic(), min(part.limit, left)
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    last = [""]

    def copy() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            last[0] = line.strip() or last[0]
            if part.saves:
                print(line, end="", flush=True)

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    while process.poll() is None and time.monotonic() - began < limit:
        if fault and part.result.exists() and part.result.stat().st_size:
            os.killpg(process.pid, signal.SIGSTOP if fault == "hang" else signal.SIGSEGV)
            limit = min(limit, time.monotonic() - began + 1) if fault == "hang" else limit
            fault = ""
        time.sleep(0.05)
    state = "ok"
    if process.poll() is None:
        state = f"over its limit of {limit:.0f} s, killed"
        _end(process, GRACE if part.saves else 0.0)
    elif process.returncode < 0:
        state = f"crashed: {signal.Signals(-process.returncode).name}"
    elif process.returncode:
        state = f"failed: exit {process.returncode}"
    _signal(process.pid, signal.SIGKILL)  # what it has started and left
    reader.join(GRACE)
    return Outcome(part.name, state, time.monotonic() - began, "" if state == "ok" else last[0])


def _end(process: subprocess.Popen[str], grace: float) -> None:
    try:
        if grace:
            _signal(process.pid, signal.SIGTERM)
        process.wait(grace)
    except subprocess.TimeoutExpired:
        _signal(process.pid, signal.SIGKILL)
        process.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def prove(
    arguments: argparse.Namespace, python: str, variables: dict[str, str], log: IO[str]
) -> list[Outcome]:
    """All parts, in the minutes there are."""
    began, outcomes = time.monotonic(), list[Outcome]()
    faults = {arguments.hang: "hang", arguments.crash: "crash"}
    for part in parts(arguments.device, python, arguments.results):
        left = 60 * arguments.minutes - (time.monotonic() - began)
        if left < 5:
            outcomes.append(Outcome(part.name, "not begun: no time was left", 0.0))
        else:
            outcomes.append(run(part, variables, log, left, faults.get(part.name, "")))
        print(f"{part.name:10} {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", flush=True)
        keep(arguments.results, outcomes)
    return outcomes


def keep(results: Path, outcomes: list[Outcome]) -> None:
    """How the parts ended so far, in a file."""
    (results / "parts.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")


def train(
    arguments: argparse.Namespace, python: str, variables: dict[str, str], log: IO[str]
) -> list[Outcome]:
    """A recipe for the minutes there are, the learning rate falling over the epochs that fit into them."""
    began, device, results, recipe = time.monotonic(), arguments.device, arguments.results, arguments.recipe
    path = {"data.path": str(arguments.data)} if arguments.data else {}
    speed = results / "training.json"
    command = [python, "benchmarks/training.py", "--recipes", recipe, "--device", device, "--seconds", "5"]
    command += ["--precisions", arguments.precision, "--out", str(speed)]
    command += ["--paths", f"{{{recipe}: {arguments.data}}}"] if arguments.data else []
    outcomes = [] if arguments.epochs else [run(Part("speed", command, 120, speed), variables, log, 120)]
    left = 60 * arguments.minutes - (time.monotonic() - began) - ENDING
    epochs = arguments.epochs or _epochs(speed, left)
    folder = Path(tempfile.mkdtemp(dir=SCRATCH)) / "run"
    options = {
        **path,
        "run_dir": str(folder),
        "trainer.accelerator": device,
        "trainer.devices": "1",
        "trainer.precision": arguments.precision,
        "trainer.max_epochs": str(epochs),
        "trainer.max_time": f"00:00:{int(max(left, 1)) // 60:02}:{int(max(left, 1)) % 60:02}",
    }
    command = [python, "examples/train.py", recipe, *(x for o, v in options.items() for x in (f"--{o}", v))]
    print(f"{recipe}, {epochs} epochs or {max(left, 1):.0f} s, {arguments.precision}", flush=True)
    part = Part("train", command, left + ENDING, folder / "metrics.csv", saves=True)
    outcomes.append(run(part, variables, log, left + ENDING))
    weights = (
        ["model.safetensors"] if (folder / "model.safetensors").is_file() else ["best.ckpt", "last.ckpt"]
    )
    for name in ("metrics.csv", "config.yaml", "results.json", *weights):
        if (folder / name).is_file():
            shutil.copy(folder / name, results / name)
    keep(results, outcomes)
    return outcomes


def _epochs(speed: Path, seconds: float) -> int:
    """How many epochs of the recipe's training sequences fit into so many seconds, validation included."""
    try:
        cells = json.loads(speed.read_text())["cells"]
        loader = next(cell for cell in cells if cell["what"] == "loader")
        model = next(cell for cell in cells if cell["what"] == "model")
    except (OSError, ValueError, StopIteration):
        return 1
    an_epoch = loader["sequences"] * (1.1 / model["per_second"] + 1 / loader["per_second"])
    return max(1, int(seconds / an_epoch))


def main() -> None:
    """The command line, as the Makefile passes it on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., object] = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to rehearse (DEVICE)")
    add("--results", type=Path, help="folder for results, at most 7 files; made anew if not given (RESULTS)")
    add("--wheels", type=Path, help="folder of `make gpu-bundle`: install from it alone (WHEELS)")
    add("--minutes", type=float, help="for all parts, 6; or for the training, 8 (MINUTES)")
    add("--data", type=Path, help="to train: folder with CIFAR-10's train.parquet and test.parquet (DATA)")
    add("--train", action="store_true", help="train a recipe, and nothing else (TRAIN=1)")
    add("--recipe", help="to train: scifar, or digits on a CPU (RECIPE)")
    add("--precision", choices=("32-true", "bf16-mixed"), default="bf16-mixed", help="of it (PRECISION)")
    add("--epochs", type=int, default=0, help="of it; 0: as many as fit, from a measurement (EPOCHS)")
    names = ("tests", "kernels", "layer", "generation", "training")
    add("--hang", choices=names, help="rehearse: stop this part in the middle (HANG)")
    add("--crash", choices=names, help="rehearse: crash this part in the middle (CRASH)")
    arguments = parser.parse_args()
    usual = 8.0 if arguments.train else 6.0 if arguments.device == "cuda" else 24.0
    arguments.minutes = arguments.minutes or usual
    arguments.recipe = arguments.recipe or ("scifar" if arguments.device == "cuda" else "digits")
    for option in ("wheels", "data"):
        folder = getattr(arguments, option)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{option}: there is no folder {folder}")
        setattr(arguments, option, folder and folder.resolve())
    if arguments.data is None and arguments.wheels and (arguments.wheels / "data").is_dir():
        arguments.data = arguments.wheels / "data"
    SCRATCH.mkdir(parents=True, exist_ok=True)
    results = arguments.results or SCRATCH / time.strftime("results-%Y%m%d-%H%M%S")
    arguments.results = results.resolve()
    arguments.results.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (arguments.results / "log.txt").open("a") as log:
        try:
            python, variables = environment(arguments.device, arguments.wheels)
        except (SetupError, subprocess.CalledProcessError, OSError) as error:
            raise SystemExit(f"make gpu: {error}") from None
        print(f"ready    after {time.monotonic() - began:.0f} s, results in {arguments.results}", flush=True)
        outcomes = (train if arguments.train else prove)(arguments, python, variables, log)
        command = [python, "benchmarks/gpu_report.py", str(arguments.results)]
        report = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        print(report.stdout if report.returncode == 0 else report.stderr, flush=True)
        log.write(report.stdout)
    raise SystemExit(any(outcome.state != "ok" for outcome in outcomes))


if __name__ == "__main__":
    main()
