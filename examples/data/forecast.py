"""Forecasting: windows of one long series, whose last steps are to be predicted from those before."""

import io
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.base import SequenceData, Spec
from data.batches import Batch
from data.storage import DataError, first_line

ETT = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small"
DAYS = {"day": 1.0, "week": 7.0, "year": 365.25}
Period = Literal["day", "week", "year"]


@dataclass(frozen=True)
class Source:
    """A series in a CSV file: a column `date` and one for each channel.

    Args:
        file: its name.
        target: the channel of univariate forecasts.
        borders: steps until the end of the training, the validation and the test part; None divides the
            series 70 : 10 : 20.
        url: where it is fetched from.
        origin: where a user finds it, if it cannot be fetched.
    """

    file: str
    target: str
    borders: tuple[int, int, int] | None = None
    url: str = ""
    origin: str = "https://github.com/zhouhaoyi/ETDataset"

    def ends(self, steps: int) -> tuple[int, int, int]:
        """Ends of the training, validation and test part of a series of so many steps."""
        if self.borders:
            return self.borders
        train, test = steps * 7 // 10, steps // 5
        return train, steps - test, steps


def _months(per_hour: int) -> tuple[int, int, int]:
    """12, 4 and 4 months of 30 days: what is left of the two years is not used."""
    month = 30 * 24 * per_hour
    return 12 * month, 16 * month, 20 * month


# Splits as in the code of Informer (arXiv 2012.07436), with which the published results were made. The paper
# says 28, 10 and 10 months for the weather data; its code, and that of S4, divides 70 : 10 : 20.
SOURCES = {
    "etth1": Source("ETTh1.csv", "OT", _months(1), f"{ETT}/ETTh1.csv"),
    "etth2": Source("ETTh2.csv", "OT", _months(1), f"{ETT}/ETTh2.csv"),
    "ettm1": Source("ETTm1.csv", "OT", _months(4), f"{ETT}/ETTm1.csv"),
    "weather": Source(
        "WTH.csv", "WetBulbCelsius", origin="the link in https://github.com/zhouhaoyi/Informer2020"
    ),
}


class Forecasting(SequenceData):
    """Windows of `context` known steps followed by `horizon` unknown ones, at every start within a part.

    Values are scaled by mean and standard deviation of the training part; scores are on that scale. Windows
    of validation and test reach `context` steps back into the part before: only their targets are new.

    From inputs and targets of a window its last known values are subtracted, and unknown values are zeros:
    a model that returns zeros says that nothing changes. Errors are the same as without the shift. Beside
    the values, inputs have a channel that is 1 where values are unknown, and sine and cosine of the time
    since each period of `calendar` began, which are known of the future too.

    Args:
        dataset: etth1, etth2 (hourly), ettm1 (every 15 minutes): loads and oil temperature of an electricity
            transformer over two years; weather: twelve measurements of one place, hourly over four years.
        horizon: steps to predict.
        context: steps to predict them from.
        multivariate: predict all channels from all, else one channel from itself.
        calendar: periods of which the time is an input; none if not given.
        path: the CSV file as published, or a folder with it as ETTh1.csv, ETTh2.csv, ETTm1.csv or WTH.csv;
            without it the first three are fetched from GitHub.
        batch_size: training windows a step, on each device.
        eval_batch_size: windows a step in validation and test.
        cache_dir: where tensors are kept; without it ~/.cache/s4-examples.
        seed: order of the training windows.
    """

    splits = ("series",)

    def __init__(
        self,
        dataset: Literal["etth1", "etth2", "ettm1", "weather"] = "etth1",
        horizon: int = 24,
        context: int = 336,
        multivariate: bool = False,
        calendar: list[Period] | None = None,
        path: Path | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        for name, steps in (("horizon", horizon), ("context", context)):
            if steps < 1:
                raise ValueError(f"data.{name} must be at least 1, got {steps}")
        self.dataset, self.source = dataset, SOURCES[dataset]
        self.horizon, self.context = horizon, context
        self.multivariate, self.calendar = multivariate, calendar or []
        channels = (12 if dataset == "weather" else 7) if multivariate else 1
        spec = Spec("value", channels + 1 + 2 * len(self.calendar), channels)
        super().__init__(spec, path, batch_size, eval_batch_size, cache_dir, seed)

    def content(self) -> dict[str, Any]:
        """The series, its channels and what else is known."""
        return {"dataset": self.dataset, "multivariate": self.multivariate, "calendar": self.calendar}

    def options(self) -> dict[str, Any]:
        """The window."""
        return {"horizon": self.horizon, "context": self.context}

    def files(self, split: str) -> list[Path]:
        """The CSV file, checked to be there."""
        if not self.path:
            return []
        file = self.path / self.source.file if self.path.is_dir() else self.path
        if not file.is_file():
            raise DataError(
                f"no file {file}; expected data.path to be {self.source.file}, or a folder with it; "
                f"it comes from {self.source.origin}"
            )
        return [file]

    def build(self, split: str) -> dict[str, Tensor]:
        """values float32 (T, C), scaled; calendar float32 (T, 2 len(calendar))."""
        dates, values = self._read()
        ends = self.source.ends(len(values))
        if len(values) < ends[-1]:
            raise DataError(f"{self.source.file}: expected at least {ends[-1]} rows, got {len(values)}")
        values, dates = values[: ends[-1]], dates[: ends[-1]]
        mean, std = values[: ends[0]].mean(0), values[: ends[0]].std(0)
        return {
            "values": torch.from_numpy((values - mean) / std).float(),
            "calendar": calendar_features(dates, self.calendar),
        }

    def setup(self, stage: str) -> None:
        """Open the series; windows are views of it."""
        super().setup(stage)
        series = self.tensors["series"]
        window = self.context + self.horizon
        self._values = series["values"].unfold(0, window, 1)
        self._calendar = series["calendar"].unfold(0, window, 1)

    def partition(self) -> dict[str, tuple[str, np.ndarray]]:
        """For each part the first steps of its windows."""
        ends = self.source.ends(len(self.tensors["series"]["values"]))
        windows = window_starts(ends, self.context, self.horizon)
        for part, rows in windows.items():
            if not len(rows):
                raise DataError(
                    f"no window of data.context={self.context} and data.horizon={self.horizon} steps "
                    f"fits in the {part} part of {self.dataset}"
                )
        return {part: ("series", rows) for part, rows in windows.items()}

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """inputs (B, context + horizon, d_input); targets (B, horizon, C), changes since the last known."""
        values = self._values.index_select(0, rows).transpose(1, 2)
        values = values - values[:, self.context - 1, None]
        unknown = torch.zeros(*values.shape[:2], 1)
        unknown[:, self.context :] = 1
        calendar = self._calendar.index_select(0, rows).transpose(1, 2)
        inputs = torch.cat([values * (1 - unknown), unknown, calendar], 2)
        return Batch(inputs, values[:, self.context :])

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """Dates (T,) and float64 values (T, C) of the file, the target last."""
        import pandas  # comes with the Hugging Face library

        source, path = self.source, self.files("series")
        try:
            table = pandas.read_csv(path[0] if path else io.BytesIO(_download(source)))
            columns = [name for name in table.columns if name not in ("date", source.target)]
            columns = [*columns, source.target] if self.multivariate else [source.target]
            dates = pandas.to_datetime(table["date"]).to_numpy("datetime64[m]")
            values = table[columns].to_numpy(np.float64)
        except (ValueError, KeyError, OSError) as error:
            where = path[0] if path else source.url
            raise DataError(
                f"cannot read {where}: {first_line(error)}; expected a CSV file with columns 'date', "
                f"{source.target!r} and others, as it comes from {source.origin}"
            ) from error
        if values.shape[1] != self.spec.d_output or not np.isfinite(values).all():
            raise DataError(
                f"{source.file}: expected {self.spec.d_output} columns of numbers beside 'date', "
                f"got {', '.join(columns)}{'' if np.isfinite(values).all() else ', some of them not finite'}"
            )
        return dates, values


def window_starts(ends: tuple[int, int, int], context: int, horizon: int) -> dict[str, np.ndarray]:
    """First steps of the windows of each part.

    Args:
        ends: ends of the training, validation and test part.
        context: known steps of a window; those of validation and test may lie in the part before.
        horizon: unknown steps, all within the part.

    Returns:
        for train, val and test the integers s of all windows s, ..., s + context + horizon - 1.
    """
    begins = (context, ends[0], ends[1])  # of the unknown steps
    return {
        part: np.arange(max(begin, context), end - horizon + 1) - context
        for part, begin, end in zip(("train", "val", "test"), begins, ends, strict=True)
    }


def calendar_features(dates: np.ndarray, periods: Sequence[Period]) -> Tensor:
    """Dates (T,) to float32 (T, 2 len(periods)): sine and cosine of the time since a period's beginning."""
    # The first of January 2001 was a Monday.
    days = (dates - np.datetime64("2001-01-01", "m")) / np.timedelta64(1, "D")
    turns = np.outer(days, [2 * np.pi / DAYS[period] for period in periods])
    return torch.from_numpy(np.stack([np.sin(turns), np.cos(turns)], 2)).flatten(1).float()


def _download(source: Source) -> bytes:
    if not source.url:
        raise DataError(f"{source.file} cannot be fetched: get it from {source.origin}, give data.path")
    try:
        with urllib.request.urlopen(source.url, timeout=60) as response:
            content: bytes = response.read()
            return content
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"cannot fetch {source.url}: {first_line(error)}; data.path takes a folder with {source.file}"
        ) from error
