"""What a model of s4 computes without a head, and how transformers loads and begins it."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from s4.block import normed
from s4.model import S4Model, state_after
from s4.padding import zero_padding
from s4.state import State
from s4.transformers.cache import S4Cache, Unmasked, apart, given_cache, together
from s4.transformers.config import S4Config
from s4.transformers.installed import CACHE, BaseModelOutputWithPast, PreTrainedModel


class S4PreTrainedModel(PreTrainedModel):
    """What the models share: how they begin, and how they are loaded and divided over devices."""

    config_class = S4Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["S4Block"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]
    # Whose rounding moves every phase of a kernel: docs/accuracy.md.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["log_dt", "A_imag"]
    _is_stateful = True  # there is no way back to before the last inputs

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As s4 and torch have it, but for embeddings, whose range is the config's. What was loaded stays."""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        loaded = {name: x.clone() for name, x in own if getattr(x, "_is_hf_initialized", False)}
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=self.config.initializer_range)
        elif own and callable(reset):
            reset()
        for name, value in loaded.items():
            getattr(module, name).copy_(value)


class S4BaseModel(S4PreTrainedModel):
    """Encoder, blocks and norm of an `s4.S4Model`, without its decoder: what `AutoModel` makes.

    Args:
        config: what it is made with.

    Examples:
        >>> model = S4BaseModel(S4Config(vocab_size=50, hidden_size=16, num_hidden_layers=1))
        >>> model(torch.randint(50, (2, 100))).last_hidden_state.shape
        torch.Size([2, 100, 16])
    """

    def __init__(self, config: S4Config) -> None:
        super().__init__(config)
        model = S4Model.from_config({**config.model(1, "none"), "decoder": {"type": "Identity"}})
        self.encoder, self.blocks, self.norm = model.encoder, model.blocks, model.norm
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The encoder, an embedding or a linear map."""
        return self.encoder

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another encoder in its place.

        Args:
            value: the encoder.
        """
        self.encoder = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        cache: S4Cache | State | None = None,
        past_key_values: S4Cache | State | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Features of each position.

        Args:
            input_ids: (B, L) tokens; or one of the next two.
            inputs_embeds: (B, L, H), what the encoder makes of its inputs.
            input_values: (B, L, ...) real inputs of the encoder.
            attention_mask: (B, L), 0 at padding. What is masked, on the left, on the right or between, counts
                for nothing: all others give what they give without it, and features there are zero. Where a
                state was passed, the positions before may stand in front, as `generate` has it.
            cache: the state to go on from: an `S4Cache`, which then holds the state after these inputs, or an
                `s4.State`.
            past_key_values: `cache`, by its name before transformers 5.24.
            use_cache: return the state after the last inputs. If None: where a cache was passed, and in
                evaluation if the config says so and no layer is bidirectional.
            output_hidden_states: also return the inputs of all blocks, and the features: (B, L, H) each.
            return_dict: return a dataclass, or a tuple.

        Returns:
            last_hidden_state (B, L, H), the features; the state and the blocks' inputs where asked for.

        Raises:
            ValueError, TypeError: not one kind of inputs, or a wrong shape, dtype or combination.
        """
        u, embedded = _inputs(input_ids, inputs_embeds, input_values)
        passed = given_cache(cache, past_key_values)
        before = None if passed is None else passed.state
        if use_cache is None:
            use_cache = passed is not None or (self.config.use_cache and not self.training and self.causal())
        batch, L = u.shape[:2]
        unmasked = Unmasked.of(attention_mask, batch, L, passed is not None)
        lengths = None if unmasked is None else unmasked.lengths
        if unmasked is not None:
            u = together(u, unmasked)
        heard: list[Tensor] | None = (
            [] if chosen(output_hidden_states, self.config.output_hidden_states) else None
        )
        x, layers = self._run(u if embedded else self.encoder(u), before, lengths, use_cache, heard)
        if self.norm is not None:
            x = normed(self.norm, x, lengths)
        if lengths is not None:
            x = zero_padding(x, lengths.to(x.device))
        if use_cache:
            passed = S4Cache() if passed is None else passed
            passed.state = state_after(x, layers, before, counted(x, lengths))
            passed.seen += L
        features = [*(heard or ()), x]
        if unmasked is not None:
            features = [apart(each, unmasked) for each in features]
        output = BaseModelOutputWithPast(
            last_hidden_state=features[-1],
            hidden_states=None if heard is None else tuple(features),
            **{CACHE: passed if use_cache else None},
        )
        return output if chosen(return_dict, self.config.return_dict) else output.to_tuple()

    def causal(self) -> bool:
        """Whether no layer is bidirectional, so that there is a state."""
        return not any(block.layer.bidirectional for block in self.blocks)

    def _run(
        self,
        x: Tensor,
        before: State | None,
        lengths: Tensor | None,
        use_cache: bool,
        heard: list[Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs of the last block, and the layers' states; inputs of the blocks are put into `heard`."""
        if before is not None and len(before.layers) != len(self.blocks):
            raise ValueError(f"cache must hold {len(self.blocks)} layers, got {len(before.layers)}")
        # One position of a sequence that goes on costs a step.
        step = before is not None and x.shape[1] == 1 and lengths is None and not self.training
        layers: list[Any] = []
        for i, block in enumerate(self.blocks):
            if heard is not None:
                heard.append(x)
            state = None if before is None else before.layers[i]
            if step and state is not None:
                y, state = block.step(x[:, 0], state)
                x = y[:, None]
            else:
                run = partial(block, lengths=lengths, return_state=use_cache)
                if self.gradient_checkpointing and self.training:
                    run = partial(self._gradient_checkpointing_func, run)
                x = run(x, state)
                if use_cache:
                    x, state = x
            if use_cache:
                layers.append(state)
        return x, tuple(layers)


def _inputs(ids: Tensor | None, embeds: Tensor | None, values: Tensor | None) -> tuple[Tensor, bool]:
    """What the model was given, and whether the encoder has seen it."""
    found = [u for u in (ids, embeds, values) if u is not None]
    if len(found) != 1 or found[0].dim() < 2:
        raise ValueError(
            "one of input_ids, inputs_embeds and input_values must be given, of shape (batch, length, ...), "
            f"got {[tuple(u.shape) for u in found]}"
        )
    return found[0], embeds is not None


def counted(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(B,), how many inputs each sequence of features x (B, L, H) has, on their device."""
    if lengths is None:
        return torch.full(x.shape[:1], x.shape[1], device=x.device)
    return lengths.to(x.device)


def chosen(given: bool | None, default: bool | None) -> bool:
    """An option of one call, or the config's."""
    return bool(default if given is None else given)
