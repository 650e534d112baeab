"""A pytest plugin that writes down each test as it begins and as it ends: --record FILE, a line of JSON each.

So what a run that is killed had proved, and which test it was killed in, is known.
"""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="file for a line of JSON a test")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("record")
    if file and not hasattr(config, "workerinput"):  # xdist's workers report to this process
        config.pluginmanager.register(Recorder(file))


class Recorder:
    """Lines {"test", "outcome", "seconds", "message"}; outcomes are "began", and those of pytest."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("w")

    def _write(self, test: str, outcome: str, seconds: float = 0.0, message: str = "") -> None:
        row = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "message": message}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, "began")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report.duration, _message(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", 0.0, _message(report))


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The error in one line."""
    if not report.failed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if crash else lines[-1]) if lines else ""
