"""How the progress of a run is shown."""

import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.console import Console


class BarProgress(RichProgressBar):
    """Lightning's progress bar without the version of the loggers: a run has its own folder."""

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What is shown beside the bar."""
        return {
            name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"
        }


class LineProgress(ProgressBar):
    """Progress as a few plain lines, for logs: one every 30 seconds and one after each validation."""

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds, self.console = seconds, Console(highlight=False, soft_wrap=True)
        self._began = self._last = time.monotonic()
        self._first_step = 0

    def disable(self) -> None:
        """Lightning silences the other ranks with this."""
        self.console.quiet = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A line if it is time."""
        if time.monotonic() - self._last > self.seconds:
            self._line(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A line if it is time."""
        self._place("validating", batch_idx, trainer.num_val_batches)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A line if it is time."""
        self._place("testing", batch_idx, trainer.num_test_batches)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A line if it is time."""
        self._place("predicting", batch_idx, trainer.num_predict_batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A line with the validation figures."""
        if trainer.training or trainer.state.fn == "fit":
            self._line(trainer, pl_module)

    def _place(self, doing: str, batch_idx: int, batches: Sequence[int | float]) -> None:
        if time.monotonic() - self._last > self.seconds:
            self._last = time.monotonic()
            self.console.print(f"{doing}  batch {batch_idx + 1} of {batches[0]}")

    def _line(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.monotonic()
        metrics = self.get_metrics(trainer, pl_module)
        figures = "  ".join(
            f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)
        )
        step, last = trainer.global_step, trainer.estimated_stepping_batches
        left = (last - step) * (self._last - self._began) / max(1, step - self._first_step)
        self.console.print(
            f"epoch {trainer.current_epoch}  step {step} of {last}  {left / 60:.1f} min left  {figures}"
        )
