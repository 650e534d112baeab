"""`make gpu`: it survives its parts, refuses what is wrong, and its table has what failed first."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
from scripts import ROOT, run

pytest.importorskip("lightning", reason="the benchmarks need the extra 'examples'")
import gpu
from make_gpu import report


def test_make_gpu_survives_its_parts(tmp_path: Path) -> None:
    """A rehearsal on the CPU: one part hangs, one crashes, and the table has both and all of the rest."""
    done = run(
        "benchmarks/gpu.py", "--device", "cpu", "--results", str(tmp_path), "--hang", "kernels",
        "--crash", "generation",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("machine ") :].rstrip().splitlines()
    assert len(table) <= 60
    # The first of each, below the failures.
    rows = {line.split()[0]: line for line in reversed(table) if line and ":" not in line.split()[0]}
    assert re.match(r"kernels: over its limit of \d+ s, killed", table[2])
    assert table[3].startswith("generation: crashed: SIGSEGV")
    assert re.search(r"FAILED .* cells, not all", rows["kernels"])
    assert "FAILED" in rows["generation"]
    for part in ("backends", "tests", "layer", "training"):
        assert re.search(rf"{part} +ok ", rows[part]), done.stdout
    assert re.search(r"\d+ passed", rows["tests"])
    assert sum(line.startswith("S4") and "(2, 8, 64) bfloat16" in line for line in table) == 4
    assert any(line.startswith("digits, model bf16-mixed") for line in table)
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {*(f"{n}.json" for n in ("parts", "kernels", "layer", "generation", "training")),
                     "tests.jsonl", "log.txt"}  # fmt: skip
    ended = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    assert {row["outcome"] for row in ended} == {"began", "passed"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--minutes 0", "--minutes at least 0.5"),
        ("--device cuda --train --minutes 2", "--minutes at least 3"),
        ("--minutes x", "--minutes invalid"),
        ("--epochs -1", "--epochs at least 0"),
        ("--recipe nix", "--recipe nix"),
        ("--hang nix", "--hang nix"),
        ("--device tpu", "--device tpu"),
        ("--wheels nowhere", "--wheels there is no folder nowhere"),
        ("--train --data {here}", "--data no train.parquet {here}"),
    ],
)
def test_make_gpu_refuses_what_is_wrong_in_a_line(arguments: str, words: str, tmp_path: Path) -> None:
    given = ["gpu.py", "--device", "cpu", *arguments.format(here=tmp_path).split()]
    with mock.patch.object(sys, "argv", given), pytest.raises(SystemExit) as ended:
        gpu.command_line()
    message = str(ended.value)
    assert len(message.splitlines()) == 1
    for word in words.format(here=tmp_path).split():
        assert word in message


def test_an_interrupt_leaves_nothing_running_and_says_how_far_it_was(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--results", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for _ in range(1200):
            if (tmp_path / "tests.jsonl").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.terminate()  # as Ctrl-C, which a process in the background may be deaf to
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "interrupted" in printed[printed.index("FAILED") :]
    assert re.search(r"backends +ok", printed)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # one that has just ended
            assert str(tmp_path / "tests.jsonl").encode() not in path.read_bytes()


def test_what_needs_a_gpu_is_where_make_gpu_looks() -> None:
    marked = {p.name for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text()}
    marked -= {Path(__file__).name}
    assert marked == {Path(word).name for word in gpu.PARTS["cuda"]["tests"][1].split() if ".py" in word}


def test_the_report_of_make_gpu_puts_failures_first_and_keeps_to_its_lines(tmp_path: Path) -> None:
    rows = [{"test": f"t{i}", "outcome": "began", "seconds": 0, "message": ""} for i in range(99)]
    rows += [{"test": f"t{i}", "outcome": "failed", "seconds": 1, "message": "off"} for i in range(98)]
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [
        {
            "who": who, "B": B, "L": 8, "H": 64, "dtype": "float32", "backward": b, "ms": 1.5,
            "floor: bytes": 0.5, "took": "fft" if who.endswith("auto") else "",
        }
        for B in range(40) for b in (False, True) for who in ("S4 fft", "S4 scan", "S4 auto", "LSTM")
    ]  # fmt: skip
    (tmp_path / "layer.json").write_text(
        json.dumps({"cells": cells, "failures": {"S4 scan: x": "no memory"}})
    )
    (tmp_path / "parts.json").write_text(
        json.dumps([{"name": "tests", "state": "over its limit", "seconds": 9.0, "said": "[90%]"}])
    )
    lines = report.report(tmp_path)
    assert len(lines) == 60
    assert lines[2] == "FAILED: 101"
    assert lines[3] == "tests: over its limit; [90%]"
    assert lines[4] == "t0: off"
    assert sum(line.startswith("t") and line.endswith(": off") for line in lines) >= 4
    assert any(line.startswith("and 9") for line in lines)


def test_epochs_are_those_that_fit(tmp_path: Path) -> None:
    cells = [
        {"what": "loader", "sequences": 45000, "per_second": 1e9},
        {"what": "model", "sequences": 45000, "per_second": 1000.0},
    ]
    file = tmp_path / "training.json"
    file.write_text(json.dumps({"cells": cells}))
    assert gpu.epochs_in(file, 550.0) == 9  # in 495 s, 49.5 and some each: a tenth of it is validation
    assert gpu.epochs_in(file, 5.0) == 1
    assert gpu.epochs_in(tmp_path / "none.json", 500.0) == 1
