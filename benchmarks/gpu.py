"""Everything that a GPU has to prove, in a few minutes: `make gpu`.

    make gpu [RESULTS=folder] [WHEELS=folder]           tests, then benchmarks with small budgets
    make gpu TRAIN=1 DATA=folder MINUTES=8              sequential CIFAR-10 for that long, weights kept
    make gpu DEVICE=cpu [HANG=layer] [CRASH=kernels]    a rehearsal with tiny sizes, and what a fault leaves

Each part runs in a process of its own under a time limit, and writes its results as they come: what hangs,
crashes or runs out of memory costs no other part. A table comes last, failures first. Of an earlier run in
RESULTS the files go. Nothing but Python's standard library is needed to start: the environment is the Python
that runs this if that has torch for the device, or else .venv, made if need be. With WHEELS, a folder of
`make gpu-bundle`, nothing is downloaded.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from make_gpu.environment import ROOT, SCRATCH, SetupError, environment

GRACE = 10.0  # seconds for a training to save in, between SIGTERM and SIGKILL
REPORT = 8.0  # seconds kept for the table
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
    notes: list[str] = field(default_factory=list)  # lines of its output that belong into the table


# Each part's limit in seconds and options: for a GPU, where all have a few minutes, and for a rehearsal.
PARTS = {
    "cuda": {
        # Also compiles what the other parts need, once instead of in every worker.
        "backends": (60, "-m s4.info"),
        "tests": (
            110,
            "-m gpu tests/test_gpu.py tests/test_devices.py tests/test_backends.py tests/test_keops.py",
        ),
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
        "backends": (300, "-m s4.info"),
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


TRAINED = ("metrics.csv", "config.yaml", "results.json", "model.safetensors")  # what is kept of a training
# All that may be in the folder of results: seven of them after a run.
FILES = (
    "parts.json",
    "log.txt",
    "tests.jsonl",
    *(f"{name}.json" for name in ("kernels", "layer", "generation", "training")),
    *TRAINED,
)


def parts(device: str, python: str, results: Path) -> list[Part]:
    """Tests and benchmarks."""
    found = []
    for name, (limit, options) in PARTS[device].items():
        if name == "backends":
            out, command = results / "parts.json", [python]
        elif name == "tests":
            out = results / "tests.jsonl"
            command = [python, "-m", "pytest", "-q", "--tb=short"]
            command += ["-p", "make_gpu.recorder", "--record", str(out)]
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
    part.result.with_suffix(".part").unlink(missing_ok=True)
    began, limit, rehearsed = time.monotonic(), min(part.limit, left), " (rehearsed)" if fault else ""
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []

    def copy() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            lines.extend([line.strip()] if line.strip() else [])
            if part.saves:
                print(line, end="", flush=True)

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    try:
        while process.poll() is None and time.monotonic() - began < limit:
            if fault and part.result.exists() and part.result.stat().st_size:
                _signal(process.pid, signal.SIGSTOP if fault == "hang" else signal.SIGSEGV)
                limit = min(limit, time.monotonic() - began + 1) if fault == "hang" else limit
                fault = ""
            time.sleep(0.05)
        code = process.poll()
    finally:  # also of an interrupt, which must leave nothing on the GPU
        if process.poll() is None and part.saves:
            _signal(process.pid, signal.SIGTERM)
            _wait(process)
        _signal(process.pid, signal.SIGKILL)  # with what it has started and left
        _wait(process)
        part.result.with_suffix(".part").unlink(missing_ok=True)
    reader.join(GRACE)
    state = "ok"
    if code is None:
        state = f"over its limit of {limit:.0f} s, killed"
    elif code < 0:
        state = f"crashed: {signal.Signals(-code).name}"
    elif code:
        state = f"failed: exit {code}"
    state += rehearsed if state != "ok" else ""
    notes = [line for line in lines if "not available: " in line] if part.name == "backends" else []
    said = lines[-1] if lines and state != "ok" else ""
    return Outcome(part.name, state, time.monotonic() - began, said, notes)


def _wait(process: subprocess.Popen[str]) -> None:
    """For some seconds: one that is stuck in a driver never ends."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def prove(run_of: "Run") -> None:
    """All parts, in the minutes there are."""
    arguments = run_of.arguments
    faults = {arguments.hang: "hang", arguments.crash: "crash"}
    chosen = parts(arguments.device, run_of.python, arguments.results)
    for part in (part for part in chosen if part.name in arguments.parts):
        if run_of.left() < 5:
            run_of.add(Outcome(part.name, "not begun: no time was left", 0.0))
        else:
            run_of.add(run(part, run_of.variables, run_of.log, run_of.left(), faults.get(part.name, "")))


@dataclass
class Run:
    """What all parts share, and how those so far ended."""

    arguments: argparse.Namespace
    python: str
    variables: dict[str, str]
    log: IO[str]
    began: float
    outcomes: list[Outcome] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the minutes are over, less what the table takes."""
        return 60 * self.arguments.minutes - (time.monotonic() - self.began) - REPORT

    def add(self, outcome: Outcome) -> None:
        """Show how a part ended, and keep it in a file."""
        self.outcomes.append(outcome)
        print(f"{outcome.name:10} {outcome.state}, {outcome.seconds:.0f} s", flush=True)
        content = json.dumps([asdict(o) for o in self.outcomes], indent=1)
        (self.arguments.results / "parts.json").write_text(content + "\n")

    def report(self) -> None:
        """Print the table."""
        command = [self.python, "benchmarks/make_gpu/report.py", str(self.arguments.results)]
        done = subprocess.run(command, cwd=ROOT, env=self.variables, capture_output=True, text=True)
        print(done.stdout if done.returncode == 0 else done.stderr, flush=True)
        self.log.write(done.stdout)


def train(run_of: Run) -> None:
    """A recipe for the minutes there are, the learning rate falling over the epochs that fit into them."""
    arguments, results = run_of.arguments, run_of.arguments.results
    recipe, speed = arguments.recipe, results / "training.json"
    if not arguments.epochs:
        command = [run_of.python, "benchmarks/training.py", "--recipes", recipe, "--seconds", "5"]
        command += ["--device", arguments.device, "--precisions", arguments.precision, "--out", str(speed)]
        command += ["--paths", f"{{{recipe}: {arguments.data}}}"] if arguments.data else []
        run_of.add(run(Part("speed", command, 120, speed), run_of.variables, run_of.log, run_of.left()))
        if run_of.outcomes[-1].state != "ok":
            return
    seconds = max(1.0, run_of.left() - ENDING)
    epochs = arguments.epochs or epochs_in(speed, seconds)
    folder = Path(tempfile.mkdtemp(dir=SCRATCH)) / "run"
    options = {
        "run_dir": str(folder),
        "trainer.accelerator": arguments.device,
        "trainer.devices": "1",
        "trainer.precision": arguments.precision,
        "trainer.max_epochs": str(epochs),
        "trainer.max_time": f"00:00:{int(seconds) // 60:02}:{int(seconds) % 60:02}",
        **({"data.path": str(arguments.data)} if arguments.data else {}),
    }
    command = [run_of.python, "examples/train.py", recipe]
    command += [text for name, value in options.items() for text in (f"--{name}", value)]
    print(f"{recipe}: {epochs} epochs or {seconds:.0f} s, {arguments.precision}, in {folder}", flush=True)
    part = Part("train", command, seconds + ENDING, folder / "metrics.csv", saves=True)
    try:
        run_of.add(run(part, run_of.variables, run_of.log, seconds + ENDING))
    finally:
        _keep_training(folder, results, run_of)


def _keep_training(folder: Path, results: Path, run_of: Run) -> None:
    """Curve, configuration, scores and weights; without the optimizer, which is twice as large."""
    for name in TRAINED:
        if (folder / name).is_file():
            shutil.copy(folder / name, results / name)
    cut_short = [file for file in (folder / "best.ckpt", folder / "last.ckpt") if file.is_file()]
    if cut_short and not (folder / "model.safetensors").is_file():
        code = """
import sys, torch
from safetensors.torch import save_file
weights = torch.load(sys.argv[1], map_location="cpu", weights_only=True)["state_dict"]
save_file({name: weight.contiguous() for name, weight in weights.items()}, sys.argv[2])
"""
        command = [run_of.python, "-c", code, str(cut_short[0]), str(results / "model.safetensors")]
        subprocess.run(command, env=run_of.variables, stdout=run_of.log, stderr=run_of.log, timeout=60)


def epochs_in(speed: Path, seconds: float) -> int:
    """How many epochs of the recipe's training sequences fit into so many seconds, validation included."""
    try:
        cells = json.loads(speed.read_text())["cells"]
        loader = next(cell for cell in cells if cell["what"] == "loader")
        model = next(cell for cell in cells if cell["what"] == "model")
    except (OSError, ValueError, StopIteration):
        return 1
    an_epoch = loader["sequences"] * (1.1 / model["per_second"] + 1 / loader["per_second"])
    return max(1, int(0.9 * seconds / an_epoch))  # a tenth for what Lightning does around the steps


def command_line() -> argparse.Namespace:
    """The options, as the Makefile passes them on; what is wrong ends the program in a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False
    )
    add: Callable[..., object] = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to rehearse (DEVICE)")
    add("--results", type=Path, help="folder for results, at most 7 files; build/gpu/results-TIME (RESULTS)")
    add("--wheels", type=Path, help="folder of `make gpu-bundle`: install from it alone (WHEELS)")
    add("--minutes", type=float, help="for everything, 6; for a training 8, and at least 3 (MINUTES)")
    add("--parts", default=",".join(PARTS["cuda"]), help="those to run, all unless told (PARTS)")
    add("--data", type=Path, help="to train: folder with train.parquet and test.parquet (DATA)")
    add("--train", action="store_true", help="train a recipe, and nothing else (TRAIN=1)")
    add("--recipe", help="to train, of examples/recipes: scifar, or digits on a CPU (RECIPE)")
    add("--precision", choices=("32-true", "bf16-mixed"), default="bf16-mixed", help="of it (PRECISION)")
    add("--epochs", type=int, default=0, help="of it; 0: as many as fit, from a measurement (EPOCHS)")
    add("--hang", choices=PARTS["cpu"], help="rehearse: stop this part in the middle (HANG)")
    add("--crash", choices=PARTS["cpu"], help="rehearse: crash this part in the middle (CRASH)")
    try:
        arguments = parser.parse_args()
    except argparse.ArgumentError as error:
        raise SystemExit(f"make gpu: {error}") from None
    usual = 8.0 if arguments.train else 6.0 if arguments.device == "cuda" else 24.0
    arguments.minutes = usual if arguments.minutes is None else arguments.minutes
    least = 3.0 if arguments.train and arguments.device == "cuda" else 0.5
    if not arguments.minutes >= least:
        raise SystemExit(f"make gpu: --minutes must be at least {least:g}, got {arguments.minutes:g}")
    arguments.parts = arguments.parts.split(",")
    if unknown := [part for part in arguments.parts if part not in PARTS["cuda"]]:
        raise SystemExit(f"make gpu: --parts: {unknown[0]!r} is none of {', '.join(PARTS['cuda'])}")
    if arguments.epochs < 0:
        raise SystemExit(f"make gpu: --epochs must be at least 0, got {arguments.epochs}")
    arguments.recipe = arguments.recipe or ("scifar" if arguments.device == "cuda" else "digits")
    if not (ROOT / "examples" / "recipes" / f"{arguments.recipe}.yaml").is_file():
        raise SystemExit(f"make gpu: --recipe: there is no examples/recipes/{arguments.recipe}.yaml")
    for option in ("wheels", "data"):
        folder = getattr(arguments, option)
        if folder is not None and not folder.is_dir():
            raise SystemExit(f"make gpu: --{option}: there is no folder {folder}")
        setattr(arguments, option, folder and folder.resolve())
    bundled = arguments.wheels and arguments.wheels / "data"
    if arguments.train and arguments.recipe == "scifar" and bundled and bundled.is_dir():
        arguments.data = arguments.data or bundled
    if arguments.train and arguments.data and not (arguments.data / "train.parquet").is_file():
        raise SystemExit(f"make gpu: --data: there is no train.parquet in {arguments.data}")
    return arguments


def main() -> None:
    """Find the environment, run the parts, print the table."""
    began, arguments = time.monotonic(), command_line()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the parts end, the table comes
    try:
        SCRATCH.mkdir(parents=True, exist_ok=True)
        python, variables = environment(arguments.device, arguments.wheels)
        results = arguments.results or SCRATCH / time.strftime("results-%Y%m%d-%H%M%S")
        arguments.results = results.resolve()
        arguments.results.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (arguments.results / name).unlink(missing_ok=True)
        log = (arguments.results / "log.txt").open("w")
    except (SetupError, subprocess.CalledProcessError, OSError) as error:
        raise SystemExit(f"make gpu: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("make gpu: interrupted before any part had begun") from None
    with log:
        print(f"ready    after {time.monotonic() - began:.0f} s, results in {arguments.results}", flush=True)
        if arguments.device == "cpu":
            print("tiny sizes, to rehearse: the speeds mean nothing", flush=True)
        run_of = Run(arguments, python, variables, log, began)
        try:
            (train if arguments.train else prove)(run_of)
        except KeyboardInterrupt:
            run_of.add(Outcome("interrupt", "interrupted", time.monotonic() - began))
        run_of.report()
    raise SystemExit(any(outcome.state != "ok" for outcome in run_of.outcomes))


if __name__ == "__main__":
    main()
