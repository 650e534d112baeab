"""S4Config: what a model of s4 is made with, as transformers keeps it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from s4.block import S4Block
from s4.checks import check_flag, check_integer, check_number, check_option
from s4.model import S4Model
from s4.transformers.installed import PreTrainedConfig

_OF_LAYER = (
    "d_state", "variant", "init", "discretization", "dt_min", "dt_max", "n_ssm", "bidirectional", "mode",
    "backend",
)  # fmt: skip
_OF_BLOCK = (
    "norm", "prenorm", "activation", "dropout", "residual_dropout", "tie_dropout", "mixer", "d_ff",
)  # fmt: skip


class S4Config(PreTrainedConfig):
    """The fields of a stack of equal S4 blocks between an encoder and a head; all of them have defaults.

    Args:
        vocab_size: number of tokens, of an encoder that is an embedding and of the head of a language model.
        d_input: width of real inputs, whose encoder is a linear map; 0 for tokens.
        hidden_size: width of the blocks, d_model of `s4.S4Layer`.
        num_hidden_layers: how many blocks.
        d_state, variant, init, discretization, dt_min, dt_max, n_ssm, bidirectional, mode, backend: of every
            `s4.S4Layer`.
        norm, prenorm, activation, dropout, residual_dropout, tie_dropout, mixer, d_ff: of every `s4.S4Block`;
            pre-norm blocks are followed by a norm of their kind by position, RMS norm or layer norm.
        pooling: of a classifier, "mean" or "last".
        head_bias: whether the linear map that ends the model has a bias.
        initializer_range: standard deviation of the first values of embeddings. All else begins as in s4.
        use_cache: whether a model in evaluation returns its state, which `generate` goes on from.
        tie_word_embeddings: whether the head of a language model is the embedding.
        pad_token_id, bos_token_id, eos_token_id: of the tokenizer; what is padding is told by
            `attention_mask` alone.
        s4_model: `S4Model.config()` of a model that the other fields do not describe, and which is made then:
            blocks that differ, another norm, encoder or decoder. `from_s4` fills it in where it is needed.

    The fields of every PreTrainedConfig are taken, too: num_labels, id2label, problem_type, dtype, ...

    Raises:
        ValueError, TypeError: a value or a combination that does not exist; the message names it.

    Examples:
        >>> config = S4Config(vocab_size=50257, hidden_size=512, num_hidden_layers=6, d_ff=2048)
        >>> config.d_model, config.d_state
        (512, 64)
    """

    model_type: ClassVar[str] = "s4"
    attribute_map: ClassVar[dict[str, str]] = {"d_model": "hidden_size", "n_layers": "num_hidden_layers"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    vocab_size: int = 256
    d_input: int = 0
    hidden_size: int = 256
    num_hidden_layers: int = 4
    d_state: int = 64
    variant: str = "dplr"
    init: Any = "legs"
    discretization: str | None = None
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    n_ssm: int = 1
    bidirectional: bool = False
    mode: str = "auto"
    backend: str = "auto"
    norm: str = "layer"
    prenorm: bool = True
    activation: str = "gelu"
    dropout: float = 0.0
    residual_dropout: float = 0.0
    tie_dropout: bool = False
    mixer: str = "glu"
    d_ff: int = 0
    pooling: str = "mean"
    head_bias: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    s4_model: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what is given: as transformers has it, fields of the base class are in `kwargs`."""
        if "format" in kwargs and "s4" in kwargs:
            raise ValueError(
                "this config.json is s4's own: S4Model.from_pretrained reads it, and from_s4 of "
                "S4ForCausalLM or S4ForSequenceClassification makes a model of transformers of that"
            )
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            check_integer(name, getattr(self, name), 1)
        check_integer("d_input", self.d_input, 0)
        check_number("initializer_range", self.initializer_range, 0)
        check_option("pooling", self.pooling, ("mean", "last"))
        for name in ("head_bias", "use_cache", "tie_word_embeddings"):
            check_flag(name, getattr(self, name))
        if self.s4_model is not None:
            self._check_s4_model(self.s4_model)
            return
        with torch.device("meta"):
            block = S4Block.from_config(self._block())
        if not isinstance(self.init, str):  # tensors, as JSON has them
            self.init = block.layer.config()["init"]

    def _check_s4_model(self, config: Mapping[str, Any]) -> None:
        """That the other fields are of the same model, but for its number of tokens, which may change."""
        with torch.device("meta"):
            model = S4Model.from_config(config)
        wanted: dict[str, Any] = {
            "hidden_size": model.blocks[0].layer.d_model,
            "num_hidden_layers": len(model.blocks),
        }
        if model.pooling != "none":
            wanted["pooling"] = model.pooling
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value!r}, as s4_model has it, got {getattr(self, name)!r}: "
                    "S4Config.from_s4 of the S4Model fills in all fields"
                )

    @classmethod
    def from_s4(cls, model: S4Model, fields: Mapping[str, Any] | None = None) -> "S4Config":
        """The config of an `S4Model`, with further fields.

        Args:
            model: the model.
            fields: values by the names of fields, such as those of the tokenizer.

        Returns:
            the config.

        Raises:
            ValueError: a model with parts that no config describes.
        """
        given = without_dtypes(model.config())
        first, encoder = given["blocks"][0], given["encoder"]
        common: dict[str, Any] = {
            "hidden_size": first["layer"]["d_model"],
            "num_hidden_layers": len(given["blocks"]),
            "vocab_size": encoder.get("num_embeddings", 256),
            "d_input": encoder.get("in_features", 0),
            "head_bias": given["decoder"].get("bias", True),
            "pooling": "mean" if given["pooling"] == "none" else given["pooling"],
            **(fields or {}),
        }
        equal = {name: first["layer"][name] for name in _OF_LAYER} | {name: first[name] for name in _OF_BLOCK}
        config = cls(**common, **equal)
        outputs = given["decoder"].get("out_features", 1)
        with torch.device("meta"):
            made = S4Model.from_config(config.model(outputs, given["pooling"]))
        if without_dtypes(made.config()) != given:
            config = cls(**common, s4_model=given)
        return config

    def model(self, outputs: int, pooling: str) -> dict[str, Any]:
        """The config of the `S4Model` that the fields describe.

        Args:
            outputs: of its decoder.
            pooling: its pooling.

        Returns:
            a dict, as `S4Model.from_config` takes it.
        """
        width = self.hidden_size
        head = {"type": "Linear", "in_features": width, "out_features": outputs, "bias": self.head_bias}
        tokens = {"type": "Embedding", "num_embeddings": self.vocab_size, "embedding_dim": width}
        reals = {"type": "Linear", "in_features": self.d_input, "out_features": width, "bias": True}
        if self.s4_model is not None:  # but for the sizes that transformers may have changed since
            found = {**self.s4_model, "pooling": pooling}
            if found["decoder"]["type"] in ("Linear", "Identity"):
                found["decoder"] = head
            if found["encoder"]["type"] == "Embedding":
                found["encoder"] = {**found["encoder"], "num_embeddings": self.vocab_size}
            return found
        last = {"type": "RMSNorm" if self.norm == "rms" else "LayerNorm", "normalized_shape": [width]}
        return {
            "encoder": reals if self.d_input else tokens,
            "blocks": [self._block()] * self.num_hidden_layers,
            "decoder": head,
            "norm": last if self.prenorm else None,
            "pooling": pooling,
        }

    def _block(self) -> dict[str, Any]:
        layer = {"d_model": self.hidden_size, **{name: getattr(self, name) for name in _OF_LAYER}}
        return {"layer": layer, **{name: getattr(self, name) for name in _OF_BLOCK}}


def without_dtypes(model: Mapping[str, Any]) -> dict[str, Any]:
    """An `S4Model.config()` whose parameters have the dtype that transformers gives them."""
    blocks = [
        {**block, "layer": {name: value for name, value in block["layer"].items() if name != "dtype"}}
        for block in model["blocks"]
    ]
    return {**model, "blocks": blocks}
