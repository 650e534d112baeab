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
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from gpu_environment import ROOT, SCRATCH, SetupError, environment

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


# Each part's limit in seconds and options: for a GPU, where all have a few minutes, and for a rehearsal.
PARTS = {
    "cuda": {
        "tests": (110, "-m gpu"),
        "kernels": (65, "--budget 35 --seconds 0.15 --widths 512 --states 64 --lengths 1024,16384"),
        "layer": (
            65,
            "--budget 35 --seconds 0.2 --shapes [[50,512,1024],[16,256,16384]] --dtypes float32,bfloat16",
        ),
        "generation": (45, "--budget 18 --seconds 0.5 --contexts 1024,16384 --batches 1,16"),
        # On made images: to decode the true ones takes longer than to time the model.
        "training": (45, "--seconds 4 --recipes scifar --made true --precisions 32-true,bf16-mixed"),
    },
    "cpu": {
        "tests": (300, "tests/test_devices.py -k cpu"),
        "kernels": (300, "--seconds 0 --widths 2 --states 4 --lengths 8"),
        "layer": (300, "--seconds 0 --shapes [[2,64,8]] --d_state 4 --dtypes float32,bfloat16"),
        "generation": (
            300,
            "--seconds 0 --contexts 4 --batches 1 --d_model 64 --n_layers 1 --d_state 4",
        ),
        "training": (300, "--seconds 0 --recipes digits --precisions 32-true,bf16-mixed"),
    },
}


def parts(device: str, python: str, results: Path) -> list[Part]:
    """Tests and benchmarks."""
    found = []
    for name, (limit, options) in PARTS[device].items():
        if name == "tests":
            out = results / "tests.jsonl"
            command = [python, "-m", "pytest", "-q", "--tb=short", "-p", "recorder", "--record", str(out)]
            command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
            command += ["-n", str(min(8, os.cpu_count() or 1))] if device == "cuda" else []
        else:
            out = results / f"{name}.json"
            command = [python, f"benchmarks/{name}.py", "--device", device, "--out", str(out)]
            command += ["--plots", "false"] if name != "training" else []
        found.append(Part(name, [*command, *options.split()], limit, out))
    return found


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
    add("--hang", choices=PARTS["cpu"], help="rehearse: stop this part in the middle (HANG)")
    add("--crash", choices=PARTS["cpu"], help="rehearse: crash this part in the middle (CRASH)")
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
