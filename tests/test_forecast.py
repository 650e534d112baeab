"""Forecasting: split, scale and content of the windows, against plain loops over the CSV file."""

import csv
import datetime
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

from data import forecast
from data.forecast import SOURCES, Forecasting, calendar_features, window_starts
from data.storage import DataError
from example_files import write_series

pytestmark = pytest.mark.usefixtures("own_folder")
PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("series"))


def opened(folder: Path, horizon: int = 5, context: int = 7, **options: Any) -> Forecasting:
    module = Forecasting("etth1", horizon, context, path=folder, batch_size=4, **options)
    module.prepare_data()
    module.setup("fit")
    return module


def column(folder: Path, name: str) -> list[float]:
    with (folder / "ETTh1.csv").open(newline="") as rows:
        return [float(row[name]) for row in csv.DictReader(rows)]


def starts(module: Forecasting) -> dict[str, list[int]]:
    return {part: module.parts[part][1].tolist() for part in PARTS}


@pytest.mark.parametrize(("name", "per_hour"), [("etth1", 1), ("etth2", 1), ("ettm1", 4)])
@pytest.mark.parametrize(("context", "horizon"), [(336, 24), (720, 720), (96, 168)])
def test_split_is_informers(name: str, per_hour: int, context: int, horizon: int) -> None:
    # border1s, border2s and the number of windows as in Dataset_ETT_hour and Dataset_ETT_minute.
    month = 30 * 24 * per_hour
    begins = [0, 12 * month - context, 16 * month - context]
    ends = [12 * month, 16 * month, 20 * month]
    windows = window_starts(SOURCES[name].ends(10**6), context, horizon)
    for part, begin, end in zip(PARTS, begins, ends, strict=True):
        number = (end - begin) - context - horizon + 1
        assert windows[part].tolist() == list(range(begin, begin + number))


def test_split_of_the_weather_is_informers() -> None:
    steps, context, horizon = 35_064, 100, 24
    train, test = int(steps * 0.7), int(steps * 0.2)
    windows = window_starts(SOURCES["weather"].ends(steps), context, horizon)
    assert windows["train"].tolist() == list(range(train - context - horizon + 1))
    assert windows["val"].tolist() == list(range(train - context, steps - test - context - horizon + 1))
    assert windows["test"].tolist() == list(range(steps - test - context, steps - context - horizon + 1))


def test_parts_share_no_target(folder: Path) -> None:
    module = opened(folder)
    targets = {
        part: {step for start in rows for step in range(start + 7, start + 7 + 5)}
        for part, rows in starts(module).items()
    }
    assert targets["train"] == set(range(7, 8640))
    assert targets["val"] == set(range(8640, 11520))
    assert targets["test"] == set(range(11520, 14400))


def test_context_longer_than_the_past() -> None:
    windows = window_starts((20, 26, 32), 22, 2)
    assert {part: rows.tolist() for part, rows in windows.items()} == {
        "train": [],
        "val": [0, 1, 2],
        "test": [4, 5, 6, 7, 8],
    }


def test_windows_are_those_of_a_loop(folder: Path) -> None:
    series = column(folder, "OT")
    mean, std = statistics.fmean(series[:8640]), statistics.pstdev(series[:8640])
    scaled = [(value - mean) / std for value in series]
    module = opened(folder, calendar=["day"])
    for part in PARTS:
        rows = starts(module)[part]
        chosen = [rows[0], rows[-1], rows[3]]
        batch = module.fetch("series", torch.tensor(chosen))
        assert batch.inputs.shape == (3, 12, module.spec.d_input)
        assert batch.targets.shape == (3, 5, module.spec.d_output)
        for index, start in enumerate(chosen):
            last = scaled[start + 6]
            known = [scaled[start + step] - last for step in range(7)]
            unknown = [scaled[start + 7 + step] - last for step in range(5)]
            assert batch.inputs[index, :, 0].tolist() == pytest.approx([*known, *[0] * 5], abs=1e-5)
            assert batch.inputs[index, :, 1].tolist() == [0] * 7 + [1] * 5
            of_day = [math.sin(2 * math.pi * (start + step) / 24) for step in range(12)]
            assert batch.inputs[index, :, 2].tolist() == pytest.approx(of_day, abs=1e-4)
            assert batch.targets[index, :, 0].tolist() == pytest.approx(unknown, abs=1e-5)


def test_inputs_do_not_depend_on_what_is_to_come(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "ETTh1.csv").read_text().splitlines()
    start = 9000
    for row in range(start + 7, len(lines) - 1):
        lines[row + 1] = ",".join([lines[row + 1].split(",")[0], *["99"] * 7])
    (tmp_path / "ETTh1.csv").write_text("\n".join(lines) + "\n")
    for options in ({"calendar": ["day", "year"]}, {"multivariate": True}):
        batches = [
            opened(path, **options).fetch("series", torch.tensor([start])) for path in (folder, tmp_path)
        ]
        assert torch.equal(batches[0].inputs, batches[1].inputs)
        assert not torch.equal(batches[0].targets, batches[1].targets)


def test_multivariate_scales_each_channel(folder: Path) -> None:
    module = opened(folder, multivariate=True)
    batch = module.fetch("series", torch.tensor([100]))
    assert (module.spec.d_input, module.spec.d_output) == (8, 7)
    assert batch.inputs.shape == (1, 12, 8)
    for channel, name in enumerate(("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")):
        series = column(folder, name)
        change = (series[109] - series[106]) / statistics.pstdev(series[:8640])
        assert batch.targets[0, 2, channel].item() == pytest.approx(change, abs=1e-5)


def test_calendar() -> None:
    begin = datetime.datetime(2016, 7, 1)  # a Friday
    dates = [begin + datetime.timedelta(hours=7 * step) for step in range(200)]
    features = calendar_features(np.array(dates, dtype="datetime64[m]"), ["day", "week", "year"])
    for date, row in zip(dates, features.tolist(), strict=True):
        of_day = (date.hour + date.minute / 60) / 24
        of_week = (date.weekday() + of_day) / 7
        of_year = (date - datetime.datetime(2001, 1, 1)) / datetime.timedelta(days=365.25)
        expected = [f(2 * math.pi * x) for x in (of_day, of_week, of_year) for f in (math.sin, math.cos)]
        assert row == pytest.approx(expected, abs=1e-4)


def test_loader_reads_every_window_once(folder: Path) -> None:
    module = opened(folder)
    for loader, part in ((module.val_dataloader(), "val"), (module.test_dataloader(), "test")):
        read = torch.cat([batch.targets for batch in loader])
        assert len(read) == len(module.parts[part][1]) == 2880 - 5 + 1


def test_path_of_the_file_itself(folder: Path, tmp_path: Path) -> None:
    """Whatever its name."""
    file = shutil.copy(folder / "ETTh1.csv", tmp_path / "loads.csv")
    named, found = (Forecasting(path=path).build("series") for path in (file, folder))
    assert torch.equal(named["values"], found["values"])


def test_errors(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data\.horizon must be at least 1, got 0"):
        Forecasting(horizon=0)
    with pytest.raises(DataError, match=r"no file .*ETTh2\.csv; .* comes from"):
        Forecasting("etth2", path=folder).prepare_data()
    with pytest.raises(DataError, match=r"WTH\.csv cannot be fetched.*data\.path"):
        Forecasting("weather").prepare_data()
    with pytest.raises(DataError, match=r"no window of data\.context=9000 .* train part of etth1"):
        opened(folder, context=9000)
    write_series(tmp_path / "short", rows=50)
    with pytest.raises(DataError, match="expected at least 14400 rows, got 50"):
        Forecasting(path=tmp_path / "short").prepare_data()
    for text, words in (("date,X\n2016-07-01,1\n", "'OT'"), ("date,OT\n2016-07-01,low\n", "low")):
        (tmp_path / "ETTh1.csv").write_text(text)
        with pytest.raises(DataError, match=f"cannot read .*ETTh1.csv.*{words}"):
            Forecasting(path=tmp_path).prepare_data()

    def refused(url: str, timeout: float) -> None:
        raise OSError("no route")

    monkeypatch.setattr(forecast.urllib.request, "urlopen", refused)
    with pytest.raises(DataError, match=r"cannot fetch https.*ETTh1\.csv: no route; data\.path"):
        Forecasting().prepare_data()
