"""Lightning's Trainer with one command more: generation."""

from pathlib import Path
from typing import Any

import torch
from data.base import SequenceData
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.markup import escape

from s4 import S4Model, categorical
from trainer.checkpoints import ConfigError, load_checkpoint
from trainer.report import print_results
from trainer.task import SequenceTask


class ExampleTrainer(Trainer):
    """Lightning's Trainer with one command more.

    Its arguments that are numbers of batches or fractions are named here, as `int | float` is a type of its
    own, where `Union` may give the `float | int` of another library, which takes 1 for 1.0, all batches.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | None = None,
        **others: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **others,
        )

    def generate(
        self,
        model: LightningModule,
        datamodule: SequenceData,
        ckpt_path: str | None = None,
        prompt: str = "\n",
        length: PositiveInt = 500,
        samples: PositiveInt = 1,
        temperature: PositiveFloat = 0.8,
        top_k: PositiveInt | None = None,
        top_p: ClosedUnitInterval | None = None,
    ) -> None:
        """Go on from a prompt, one token at a time; samples are printed and kept in samples.txt.

        Args:
            model: a model of tokens.
            datamodule: it was trained on.
            ckpt_path: the checkpoint to read; the best of the newest run if not given.
            prompt: the text to go on from.
            length: tokens to generate.
            samples: how many texts.
            temperature: below 1 is more likely text, above 1 more varied.
            top_k: draw from the k most likely tokens only.
            top_p: draw from the fewest tokens that hold this share of the probability.
        """
        if not isinstance(model, SequenceTask) or not isinstance(model.model, S4Model):
            raise ConfigError("generate needs model.cell s4")
        if model.spec.kind != "token":
            raise ConfigError("generate needs a model of tokens, such as shakespeare")
        datamodule.prepare_data()
        datamodule.setup("predict")
        checkpoint = load_checkpoint(Path(str(ckpt_path)))
        model.check_weights(checkpoint)
        datamodule.load_state_dict(checkpoint.get(type(datamodule).__qualname__, {}))
        model.load_state_dict(checkpoint["state_dict"])
        model.to(self.strategy.root_device).eval()
        if not prompt:
            raise ConfigError("prompt must not be empty: generation goes on from something")
        tokens = datamodule.encode(prompt).to(self.strategy.root_device)[None].expand(samples, -1)
        generator = torch.Generator(tokens.device).manual_seed(torch.initial_seed() % 2**63)
        try:
            draw = categorical(temperature, top_k=top_k, top_p=top_p, generator=generator)
        except ValueError as error:
            raise ConfigError(str(error)) from error

        def sample(y: torch.Tensor) -> torch.Tensor:
            return draw(model.adaptive.log_prob(y) if model.adaptive else y)

        new = model.model.generate(tokens, length, sample)
        texts = "\n\n".join(datamodule.decode(row) for row in torch.cat([tokens, new], 1).cpu())
        file = Path(self.default_root_dir) / "samples.txt"
        file.write_text(texts + "\n")
        Console(highlight=False, soft_wrap=True).print(escape(texts))
        print_results("Samples", {"file": file})
