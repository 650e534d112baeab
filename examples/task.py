"""Sequence classification with a stack of S4 layers, as a LightningModule."""

import math
import time
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from storage import CheckpointError
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model, param_groups


class SequenceClassifier(pl.LightningModule):
    """Linear encoder, `n_layers` S4 blocks, mean over the sequence, linear decoder; cross-entropy.

    AdamW with one learning rate for the state space parameters dt, A, B and one for all others; linear
    warm-up, then a cosine down to zero at the last step of the run.

    Args:
        d_input: channels of the input (set from the data).
        n_classes: classes (set from the data).
        d_model: channels of the model, H in the paper.
        n_layers: S4 blocks.
        d_state: state size, N in the paper.
        variant: dplr (S4) or diag (S4D).
        init: dplr: legs, legt, fout; diag: legs, lin, inv.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        n_ssm: independent (A, B) pairs a layer.
        bidirectional: look at the sequence from both ends; such a model cannot be stepped.
        mode: how a sequence is processed, see S4Layer.
        backend: who computes the kernel, see S4Layer.
        norm: layer, batch or rms.
        prenorm: normalise before each S4 layer and after the last block, else after each residual sum.
        dropout: probability.
        tie_dropout: drop whole channels, the same at every step.
        mixer: glu or linear, what follows the activation.
        lr: peak learning rate.
        ssm_lr: peak learning rate of dt, A and B.
        weight_decay: of everything but the state space parameters, norms and biases.
        warmup_steps: steps of the linear warm-up.
    """

    def __init__(
        self,
        d_input: int = 1,
        n_classes: int = 10,
        d_model: int = 128,
        n_layers: int = 4,
        d_state: int = 64,
        variant: Literal["dplr", "diag"] = "dplr",
        init: Literal["legs", "legt", "fout", "lin", "inv"] = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        n_ssm: int = 1,
        bidirectional: bool = False,
        mode: Literal["auto", "fft"] = "auto",
        backend: str = "auto",
        norm: Literal["layer", "batch", "rms"] = "layer",
        prenorm: bool = True,
        dropout: float = 0.0,
        tie_dropout: bool = False,
        mixer: Literal["glu", "linear"] = "glu",
        lr: float = 1e-2,
        ssm_lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # with them `test` rebuilds the model of a checkpoint by itself
        if n_layers < 1 or warmup_steps < 0:
            raise ValueError(f"need n_layers >= 1 and warmup_steps >= 0, got {n_layers} and {warmup_steps}")
        self.lr, self.ssm_lr, self.weight_decay, self.warmup_steps = lr, ssm_lr, weight_decay, warmup_steps

        def block() -> S4Block:
            layer = S4Layer(
                d_model,
                d_state,
                variant=variant,
                init=init,
                dt_min=dt_min,
                dt_max=dt_max,
                n_ssm=n_ssm,
                bidirectional=bidirectional,
                mode=mode,
                backend=backend,
            )
            return S4Block(
                layer, norm=norm, prenorm=prenorm, dropout=dropout, tie_dropout=tie_dropout, mixer=mixer
            )

        self.model = S4Model(
            nn.Linear(d_input, d_model),
            [block() for _ in range(n_layers)],
            nn.Linear(d_model, n_classes),
            pooling="mean",
            # What pre-norm blocks add up has no norm yet. After batch norm too, as this one is by position.
            norm=(nn.RMSNorm if norm == "rms" else nn.LayerNorm)(d_model) if prenorm else None,
        )
        self._step_began = 0.0

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, L, d_input) -> logits (B, n_classes)."""
        return self.model(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        return self._score("train", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on the held-out images."""
        self._score("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on the test images."""
        self._score("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Class probabilities (B, n_classes)."""
        return self(batch[0]).softmax(-1)

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Start the clock of this step."""
        self._step_began = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log training speed over all devices."""
        seconds = time.perf_counter() - self._step_began
        self.log("samples/s", len(batch[1]) * self.trainer.world_size / seconds, prog_bar=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another model, by name."""
        saved = {name: tuple(weight.shape) for name, weight in checkpoint["state_dict"].items()}
        own = {name: tuple(weight.shape) for name, weight in self.state_dict().items()}
        if differing := [name for name in {**own, **saved} if saved.get(name) != own.get(name)]:
            name = differing[0]
            raise CheckpointError(
                f"the checkpoint is of another model: {name} has shape {saved.get(name, 'none')} in it and "
                f"{own.get(name, 'none')} here; use the recipe and options it was trained with"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and the schedule by step."""
        if self.trainer.max_steps < 0 and (self.trainer.max_epochs or -1) < 0:
            raise MisconfigurationException(
                "the schedule needs an end: set trainer.max_epochs or trainer.max_steps"
            )
        groups = param_groups(self.model, lr=self.lr, weight_decay=self.weight_decay, ssm_lr=self.ssm_lr)
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """Learning rate at `step` as a fraction of its peak: linear warm-up, then a cosine."""
        warmup = self.warmup_steps
        if step <= warmup:
            return (step + 1) / (warmup + 1)
        # Not asked for at step 0: it would open the data before Lightning has restored its place in it.
        total = self.trainer.estimated_stepping_batches
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    def _score(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        logits = self(inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        shown = {"train": "loss", "val": "accuracy"}.get(stage)
        for name, value in (("loss", loss), ("accuracy", accuracy)):
            self.log(
                f"{stage}/{name}",
                value,
                prog_bar=name == shown,
                batch_size=len(labels),
                sync_dist=stage != "train",
            )
        return loss
