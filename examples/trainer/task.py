"""A model of sequences and how it is trained, as a LightningModule."""

import math
import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from data.base import Spec
from data.batches import Batch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanMetric, Metric, R2Score
from torchmetrics.classification import MulticlassAccuracy

from s4 import S4Block, S4Layer, S4Model, param_groups
from trainer.adaptive import AdaptiveEmbedding
from trainer.baselines import LSTMModel
from trainer.checkpoints import CheckpointError


class SequenceTask(pl.LightningModule):
    """Encoder, `n_layers` S4 blocks, decoder; cross-entropy for labels and tokens, squares for real values.

    AdamW with one learning rate for the state space parameters dt, A, B and one for all others; linear
    warm-up, then a cosine down to zero at the last step of the run.

    Args:
        spec: of the data.
        cell: s4, or lstm to compare with: the same encoder and decoder around `n_layers` of nn.LSTM.
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
        pooling: what a label is decoded from: the mean over the sequence, or its last position.
        norm: layer, batch or rms.
        prenorm: normalise before each S4 layer and after the last block, else after each residual sum.
        dropout: probability, of what follows S4 and, with `d_ff`, of hidden features.
        residual_dropout: probability, of what is added to the residual stream.
        tie_dropout: drop whole channels, the same at every step.
        mixer: glu or linear, what follows the activation.
        d_ff: hidden width of feed-forward networks, 0 for none.
        ff_every: one such network after so many S4 layers.
        cutoffs: of tokens in order of frequency, where an adaptive embedding and softmax divide them; if not
            given, an embedding and a linear map.
        embedding_dropout: probability, of an adaptive embedding and of the inputs of its softmax.
        lr: peak learning rate.
        ssm_lr: peak learning rate of dt, A and B, at most lr; or of each, as {dt: null, A: 0.001, B: 0.001},
            where null is lr and 0 leaves it as it is; C, too, may have one.
        weight_decay: of everything but the state space parameters, norms and biases.
        warmup_steps: steps of the linear warm-up.
        compile: torch.compile the model.
    """

    def __init__(
        self,
        spec: Spec,
        cell: Literal["s4", "lstm"] = "s4",
        d_model: int = 128,
        n_layers: int = 4,
        d_state: int = 64,
        variant: Literal["dplr", "diag"] = "dplr",
        init: Literal["legs", "legt", "fout", "lin", "inv"] = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        n_ssm: int = 1,
        bidirectional: bool = False,
        mode: Literal["auto", "fft", "scan"] = "auto",
        backend: str = "auto",
        pooling: Literal["mean", "last"] = "mean",
        norm: Literal["layer", "batch", "rms"] = "layer",
        prenorm: bool = True,
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
        tie_dropout: bool = False,
        mixer: Literal["glu", "linear"] = "glu",
        d_ff: int = 0,
        ff_every: int = 1,
        cutoffs: list[int] | None = None,
        embedding_dropout: float = 0.0,
        lr: float = 1e-2,
        ssm_lr: float | dict[str, float | None] = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        # With them `test` rebuilds the model of a checkpoint by itself.
        self.save_hyperparameters(ignore="spec")
        rates = ssm_lr if isinstance(ssm_lr, dict) else {"dt, A, B": ssm_lr}
        if isinstance(ssm_lr, dict) and set(ssm_lr) - {"C"} != {"dt", "A", "B"}:
            raise ValueError(
                f"model.ssm_lr must be a number, or have dt, A, B and if need be C, got {list(ssm_lr)}"
            )
        for least, values in (
            (1, {"d_model": d_model, "n_layers": n_layers, "ff_every": ff_every}),
            (0, {"warmup_steps": warmup_steps, "lr": lr, "weight_decay": weight_decay}),
            (0, {f"ssm_lr of {name}": rate for name, rate in rates.items() if rate is not None}),
        ):
            for name, value in values.items():
                if not value >= least:
                    raise ValueError(f"model.{name} must be at least {least}, got {value}")
        self.spec, self.warmup_steps = spec, warmup_steps
        self.lr, self.ssm_lr, self.weight_decay = lr, ssm_lr, weight_decay
        if cutoffs and spec.kind != "token":
            raise ValueError(f"model.cutoffs is for models that predict tokens, not a {spec.kind}")
        if embedding_dropout and not cutoffs:
            raise ValueError("model.embedding_dropout needs model.cutoffs, whose embedding it is of")
        if not 0 <= embedding_dropout < 1:
            raise ValueError(f"model.embedding_dropout must be from 0 and below 1, got {embedding_dropout}")
        if d_ff and (cell != "s4" or d_ff < 0 or ff_every > n_layers):
            raise ValueError(
                "model.d_ff must be at least 0, and 0 with model.cell lstm or model.ff_every above "
                f"model.n_layers, got {d_ff} with {cell}, {ff_every} and {n_layers}"
            )
        encoder: nn.Module = (
            AdaptiveEmbedding(spec.d_input, d_model, cutoffs, embedding_dropout)
            if cutoffs
            else (nn.Embedding if spec.tokens else nn.Linear)(spec.d_input, d_model)
        )
        # Of a pair both sequences are encoded by one model, and compared; an adaptive softmax is in the loss.
        decoder = nn.Identity() if spec.pairs or cutoffs else nn.Linear(d_model, spec.d_output)
        self.compare = (
            nn.Sequential(nn.Linear(4 * d_model, d_model), nn.GELU(), nn.Linear(d_model, spec.d_output))
            if spec.pairs
            else None
        )
        pooled = pooling if spec.kind == "label" else "none"

        def block(index: int) -> S4Block:
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
                layer,
                norm=norm,
                prenorm=prenorm,
                dropout=dropout,
                residual_dropout=residual_dropout,
                tie_dropout=tie_dropout,
                mixer=mixer,
                d_ff=0 if (index + 1) % ff_every else d_ff,
            )

        self.model: S4Model | LSTMModel
        if cell == "lstm":
            if bidirectional:
                raise ValueError("model.bidirectional is for cell s4; nn.LSTM stands here for a causal model")
            between = dropout if n_layers > 1 else 0.0
            lstm = nn.LSTM(d_model, d_model, n_layers, batch_first=True, dropout=between)
            self.model = LSTMModel(encoder, lstm, decoder, pooled)
        else:
            self.model = S4Model(
                encoder,
                [block(index) for index in range(n_layers)],
                decoder,
                pooling=pooled,
                # What pre-norm blocks add up has no norm yet. After batch norm too: this one is by position.
                norm=(nn.RMSNorm if norm == "rms" else nn.LayerNorm)(d_model) if prenorm else None,
            )
        if compile:
            self.model.compile()
        self.scores = nn.ModuleDict({stage: self._new_scores() for stage in ("val", *spec.tests)})
        self._step_began = 0.0
        self._step_scores = torch.zeros(0)

    @property
    def adaptive(self) -> AdaptiveEmbedding | None:
        """What turns outputs into probabilities, if there are cutoffs."""
        encoder = self.model.encoder
        return encoder if isinstance(encoder, AdaptiveEmbedding) else None

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """What is best, and whether more or less of it is better."""
        return ("val/accuracy", "max") if self.spec.kind == "label" else ("val/loss", "min")

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, d_output) of labels; or, of the last M positions, logits or values (B, M, d_output).

        With cutoffs, features (B, M, d_model) instead of logits.
        """
        u, lengths = batch.inputs, batch.lengths
        if u.is_floating_point():
            u = u.to(self.dtype)  # float64, if all of the model is
        if self.compare is not None:
            u, lengths = u.flatten(0, 1), None if lengths is None else lengths.flatten()
        y = self.model(u, lengths=lengths, rate=batch.rate)
        if self.compare is not None:
            a, b = y.unflatten(0, (-1, 2)).unbind(1)
            return self.compare(torch.cat([a, b, a * b, a - b], -1))
        return y if self.spec.kind == "label" else y[:, y.shape[1] - batch.targets.shape[1] :]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        y = self(batch)
        loss = self._loss(y, batch.targets)
        scores = {"train/loss": loss.detach()}
        if self.spec.kind != "value" and self.adaptive is None:
            scores["train/accuracy"] = (y.argmax(-1) == batch.targets).float().mean()
        for name, score in self._of_step(scores, batch_idx).items():
            self.log(name, score, prog_bar=name == "train/loss", batch_size=len(y))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores on sequences kept from training."""
        self._score("val", batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Scores on each test set."""
        self._score(self.spec.tests[dataloader_idx], batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Targets, and probabilities (B, d_output) or values (B, M, d_output)."""
        y = self(batch)
        return batch.targets, y.softmax(-1) if self.spec.kind == "label" else y

    def on_train_start(self) -> None:
        """Start the clock, also in the middle of an epoch."""
        self._step_began = time.perf_counter()

    def on_validation_start(self) -> None:
        """Scores count further than the 256 of a model in bfloat16."""
        for score in self.scores.modules():
            if isinstance(score, Metric):
                score.set_dtype(torch.promote_types(self.dtype, torch.float32))

    def on_test_start(self) -> None:
        """As for validation."""
        self.on_validation_start()

    def on_validation_end(self) -> None:
        """Start it again: validation is no training."""
        self._step_began = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log training speed over all devices, from the end of one step to that of the next."""
        began, self._step_began = self._step_began, time.perf_counter()
        seconds = self._step_began - began
        self.log("samples/s", len(batch.targets) * self.trainer.world_size / seconds, prog_bar=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for all digits of the weights, and refuse those of another model."""
        if self.trainer.precision == "64-true":
            self.double()  # Lightning does it after it has put the weights here, which would be rounded
        self.check_weights(checkpoint)

    def check_weights(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another model, by name."""
        saved = {name: tuple(getattr(x, "shape", ())) for name, x in checkpoint["state_dict"].items()}
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
        groups = param_groups(self, lr=self.lr, weight_decay=self.weight_decay, ssm_lr=self.ssm_lr)
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

    def save_pretrained(self, folder: Path) -> None:
        """Write the model so that `s4.S4Model.from_pretrained(folder)` reads it, with none of this code.

        What is no S4Model by itself, an LSTM and a model of pairs, is written as its weights alone.
        """
        if isinstance(self.model, S4Model) and self.compare is None:
            self.model.save_pretrained(folder)
            return
        weights = {name: weight.contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def _loss(self, y: Tensor, targets: Tensor) -> Tensor:
        if self.adaptive is not None:
            return self.adaptive.loss(y.flatten(0, -2), targets.flatten())
        y = _at_least_float32(y)
        if self.spec.kind == "value":
            return nn.functional.mse_loss(y, targets.to(y.dtype))
        return nn.functional.cross_entropy(y.flatten(0, -2), targets.flatten())

    def _of_step(self, scores: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Means over the batches of a step so far, and over all processes at its last."""
        parts = self.trainer.accumulate_grad_batches
        part = batch_idx % parts
        values = torch.stack([_at_least_float32(score) for score in scores.values()])
        self._step_scores = values if part == 0 else self._step_scores + values
        mean = self._step_scores / (part + 1)
        if part + 1 == parts and self.trainer.world_size > 1:
            torch.distributed.all_reduce(mean)
            mean = mean / self.trainer.world_size
        return dict(zip(scores, mean, strict=True))

    def _new_scores(self) -> nn.ModuleDict:
        scores: dict[str, Metric] = {"loss": MeanMetric()}
        if self.spec.kind == "value":
            scores |= {"mae": MeanAbsoluteError(), "r2": R2Score()}
        elif self.adaptive is None:
            scores["accuracy"] = MulticlassAccuracy(self.spec.d_output, average="micro")
        if self.spec.kind == "token":
            scores |= {"bits": MeanMetric(), "perplexity": Perplexity()}
        return nn.ModuleDict(scores)

    def _score(self, stage: str, batch: Batch) -> None:
        y, targets = self(batch), batch.targets
        loss = self._loss(y, targets)
        for name, score in self.scores[stage].items():
            if name in ("loss", "perplexity"):
                score.update(loss, len(y))
            elif name == "bits":
                score.update(loss / math.log(2), len(y))
            elif name == "accuracy":
                score.update(y.argmax(-1).flatten(), targets.flatten())
            else:
                score.update(_at_least_float32(y).flatten(), targets.flatten())
            shown = stage == "val" and f"val/{name}" == self.monitor[0]
            self.log(f"{stage}/{name}", score, prog_bar=shown, on_epoch=True, add_dataloader_idx=False)


def _at_least_float32(y: Tensor) -> Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float32))


class Perplexity(MeanMetric):
    """e to the mean loss of a token."""

    def compute(self) -> Tensor:
        """A scalar."""
        return super().compute().exp()
