"""Models with a head: for language, and for classes of sequences."""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from s4.model import S4Model, mean, state_after
from s4.pretrained import built
from s4.state import State
from s4.transformers.base import S4BaseModel, S4PreTrainedModel, chosen, counted
from s4.transformers.cache import S4Cache, given_cache
from s4.transformers.config import S4Config
from s4.transformers.installed import (
    CACHE,
    CausalLMOutputWithPast,
    GenerationMixin,
    SequenceClassifierOutputWithPast,
)

Me = TypeVar("Me", bound="Headed")


class Headed(S4PreTrainedModel):
    """A base model and a head, which are an `s4.S4Model` together."""

    _head: ClassVar[str]

    def __init__(self, config: S4Config) -> None:
        super().__init__(config)
        self.model = S4BaseModel(config)
        outputs = self._size(config)
        head = built(config.model(outputs, "none")["decoder"], "decoder")
        if head is None or _outputs(head) != outputs:
            found = "none" if head is None else _outputs(head)
            raise ValueError(f"the decoder of s4_model must have {outputs} outputs, got {found}")
        setattr(self, self._head, head)

    @classmethod
    def from_s4(
        cls: type[Me],
        model: S4Model,
        *,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        id2label: dict[int, str] | None = None,
    ) -> Me:
        """This kind of model with a copy of the numbers of an `S4Model`, and the same outputs.

        Args:
            model: without pooling for `S4ForCausalLM`, with it for `S4ForSequenceClassification`.
            pad_token_id, bos_token_id, eos_token_id: of the tokenizer, as `S4Config` has them.
            id2label: the names of the classes.

        Returns:
            the model, in the mode of that one, training or evaluation.

        Raises:
            TypeError, ValueError: no such model, or one with parts that no config describes.
        """
        if not isinstance(model, S4Model):
            raise TypeError(f"model must be an S4Model, got {type(model).__name__}")
        cls._check_s4(model)
        fields: dict[str, Any] = {
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id,
        }
        tied = isinstance(model.encoder, nn.Embedding) and (
            getattr(model.decoder, "weight", None) is model.encoder.weight
        )
        if id2label is None and model.pooling != "none":
            id2label = {i: f"LABEL_{i}" for i in range(_outputs(model.decoder))}
        fields |= {"tie_word_embeddings": tied, "id2label": id2label}
        fields["label2id"] = None if id2label is None else {name: i for i, name in id2label.items()}
        config = S4Config.from_s4(model, fields)
        with torch.device("meta"):
            made = cls(config)
        parts = {"decoder": cls._head}
        weights = {}
        for name, value in model.state_dict().items():
            part, _, rest = name.partition(".")
            weights[f"{parts.get(part, f'model.{part}')}.{rest}"] = value.clone()
        made.load_state_dict(weights, assign=True)
        made.tie_weights()
        return made.train(model.training)

    @classmethod
    def _check_s4(cls, model: S4Model) -> None:
        """Raise ValueError unless a model is of this kind."""
        raise NotImplementedError

    @staticmethod
    def _size(config: S4Config) -> int:
        """The number of outputs."""
        raise NotImplementedError

    def s4(self) -> S4Model:
        """The `S4Model` of these very parts: what is trained there is trained here.

        Returns:
            the model, in the mode of this one, training or evaluation.
        """
        base = self.model
        model = S4Model(
            base.encoder,
            list(base.blocks),
            getattr(self, self._head),
            norm=base.norm,
            pooling=self._pooling(),
        )
        return model.train(self.training)

    def _pooling(self) -> str:
        return "none"


class S4ForCausalLM(Headed, GenerationMixin):
    """A language model: `generate` runs the prompt once, and then costs a step a token.

    Args:
        config: what it is made with.

    Raises:
        ValueError: a config of real inputs or bidirectional layers.

    Examples:
        >>> model = S4ForCausalLM(S4Config(vocab_size=50, hidden_size=16, num_hidden_layers=1)).eval()
        >>> prompt = torch.randint(50, (2, 100))
        >>> model.generate(prompt, max_new_tokens=8, do_sample=False).shape  # with the prompt
        torch.Size([2, 108])
    """

    _head = "lm_head"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.encoder.weight"}
    accepts_loss_kwargs = True  # of Trainer: num_items_in_batch

    @staticmethod
    def _size(config: S4Config) -> int:
        return config.vocab_size

    def __init__(self, config: S4Config) -> None:
        if config.d_input:
            raise ValueError(f"S4ForCausalLM is for tokens: d_input must be 0, got {config.d_input}")
        super().__init__(config)
        if not self.model.causal():
            raise ValueError("S4ForCausalLM needs causal layers, got bidirectional=True")
        self.post_init()

    @classmethod
    def _check_s4(cls, model: S4Model) -> None:
        if model.pooling != "none" or not isinstance(model.encoder, nn.Embedding):
            raise ValueError(
                f"{cls.__name__} needs an S4Model with an nn.Embedding and pooling='none', got "
                f"{type(model.encoder).__name__} and {model.pooling!r}"
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: S4Cache | State | None = None,
        past_key_values: S4Cache | State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the token behind each position.

        Args:
            input_ids, attention_mask, inputs_embeds, cache, past_key_values: as `S4BaseModel` has them.
            use_cache, output_hidden_states, return_dict: as there; use_cache is off where there are labels.
            labels: (B, L), the tokens themselves, which are shifted here; those of -100 do not count.
            logits_to_keep: so many last positions, or these ones; 0 is all.
            num_items_in_batch: what the sum of losses is divided by, in place of the number of labels.

        Returns:
            logits (B, L, vocabulary), or of fewer positions, and the mean cross-entropy of labels.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.
        """
        if use_cache is None and labels is not None and cache is None and past_key_values is None:
            use_cache = False
        output = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            cache=cache,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        x = output.last_hidden_state
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, last])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        whole = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, **{CACHE: output.get(CACHE)}
        )
        return whole if chosen(return_dict, self.config.return_dict) else whole.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` calls the model with.

        Args:
            input_ids, attention_mask, inputs_embeds, use_cache: as in `forward`.
            next_sequence_length: how many of the last tokens the model has not seen.
            is_first_iteration: whether the prompt is to be run.
            kwargs: those of `generate` itself.

        Returns:
            the arguments of `forward`.

        Raises:
            ValueError: prompts padded on the right, no token that the cache has not seen, or a cache of
                another number of sequences.
        """
        cache = kwargs.get(CACHE)
        if isinstance(cache, S4Cache) and cache.batch_size not in (-1, len(input_ids)):
            raise ValueError(
                f"the cache must hold {len(input_ids)} sequences, got {cache.batch_size}: for beams or "
                "several sequences a prompt repeat those that it holds: cache.batch_repeat_interleave(2)"
            )
        step = bool(use_cache) and next_sequence_length == 1 and not is_first_iteration
        mask = None if step else attention_mask  # a new token is no padding
        if mask is not None and bool(((mask[:, -1] == 0) & (mask != 0).any(1)).any()):
            raise ValueError(
                "generate needs prompts that are padded on the left, got an attention_mask that ends with 0: "
                "set tokenizer.padding_side = 'left'"
            )
        for name in ("tokenizer", "assistant_tokenizer"):  # for `stop_strings`: generate hands them on
            kwargs.pop(name, None)
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                "generate with a cache needs all tokens so far and new ones behind them, or the new ones and "
                f"an attention_mask of all, got {tuple(input_ids.shape)} and a cache that has seen as many"
            )
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                "cache_implementation must be None: a model of s4 has one kind of state, got "
                f"{generation_config.cache_implementation!r}"
            )
        if generation_config.use_cache is not False:
            given = given_cache(model_kwargs.pop("cache", None), model_kwargs.pop("past_key_values", None))
            model_kwargs[CACHE] = S4Cache() if given is None else given


class S4ForSequenceClassification(Headed):
    """One prediction a sequence, of tokens or real numbers, from the mean over it or from its end.

    Args:
        config: what it is made with.

    Examples:
        >>> config = S4Config(d_input=3, hidden_size=16, num_hidden_layers=1, num_labels=10)
        >>> model = S4ForSequenceClassification(config).eval()
        >>> model(input_values=torch.randn(2, 100, 3)).logits.shape
        torch.Size([2, 10])
    """

    _head = "classifier"

    @staticmethod
    def _size(config: S4Config) -> int:
        return config.num_labels

    def __init__(self, config: S4Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.main_input_name = "input_values" if config.d_input else "input_ids"
        self.post_init()

    @classmethod
    def _check_s4(cls, model: S4Model) -> None:
        if model.pooling == "none":
            raise ValueError(f"{cls.__name__} needs an S4Model with pooling 'mean' or 'last', got 'none'")

    def _pooling(self) -> str:
        return self.config.pooling

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        cache: S4Cache | State | None = None,
        past_key_values: S4Cache | State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits (B, num_labels) of each sequence.

        Args:
            input_ids, attention_mask, inputs_embeds, input_values, cache, past_key_values: as `S4BaseModel`
                has them.
            output_hidden_states, return_dict: as there.
            labels: (B,) classes; or numbers, of a regression; or (B, num_labels), of several classes at once.
            use_cache: return the state, from which a call with the inputs behind these goes on. Done also
                where a cache was passed.

        Returns:
            logits, and the loss of labels, as `config.problem_type` has it.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.
        """
        goes_on = cache is not None or past_key_values is not None
        output = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            input_values,
            cache,
            past_key_values,
            use_cache=bool(use_cache) or goes_on,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        passed = output.get(CACHE)
        state = None if passed is None else passed.state
        pooled = _pooled(output.last_hidden_state, attention_mask, state, self.config.pooling)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        whole = SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, **{CACHE: passed}
        )
        return whole if chosen(return_dict, self.config.return_dict) else whole.to_tuple()


def _outputs(head: nn.Module) -> int:
    """The width of what a head makes, by the last of its parts that tells one; 0 if none does."""
    return ([0] + [each.out_features for each in head.modules() if isinstance(each, nn.Linear)])[-1]


def _pooled(x: Tensor, attention_mask: Tensor | None, state: State | None, pooling: str) -> Tensor:
    """The mean over all inputs so far, or the last of these, (B, H), of features x (B, L, H)."""
    L = x.shape[1]
    inside = None if attention_mask is None else attention_mask[:, attention_mask.shape[1] - L :] != 0
    if pooling == "last":
        behind = 0 if inside is None else inside.flip(1).to(torch.uint8).argmax(1)
        return x[torch.arange(len(x), device=x.device), L - 1 - behind]
    if state is None:  # of bidirectional layers, which have none; x is zero at padding
        state = state_after(x, (), None, counted(x, None if inside is None else inside.sum(1)))
    return mean(state).to(x.dtype)
