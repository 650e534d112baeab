"""S4Model: a stack of blocks between an encoder and a decoder, and generation from it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from s4 import distributed
from s4.block import S4Block, normed
from s4.checks import (
    check_features,
    check_integer,
    check_kind,
    check_lengths,
    check_module,
    check_option,
    check_resets,
    check_state,
    kind_of,
    unread,
)
from s4.distributed import Piece
from s4.generation import Sampler, Stop, check_generation, feed_back, greedy
from s4.padding import Sequences, zero_padding
from s4.pretrained import Modules, Pretrained, built, check_known, check_unused, described, described_part
from s4.sharded import hooked
from s4.state import State


class S4Model(Pretrained):
    """A stack: encoder, S4 blocks, pooling over time, decoder.

    Args:
        encoder: maps inputs (B, L, ...) to (B, L, d_model) position by position: `nn.Linear`, `nn.Embedding`.
        blocks: the stack.
        norm: applied to the outputs of the last block, position by position, before pooling: what a stack of
            pre-norm blocks ends with. None for post-norm blocks.
        decoder: maps (..., d_model) to outputs position by position: `nn.Linear`, or a norm and a linear map.
        pooling: "none", an output for each position; "last", the output of the last; "mean", the output of
            the mean over all positions.

    FSDP2 divides a layer's C, (1, H, N/2, 2), by its first dimension, which is one process's: all of it. A
    `shard_placement_fn` can tell it to divide by channels.

    Raises:
        ValueError, TypeError: an argument of the wrong kind; the message names it.

    Examples:
        >>> blocks = [S4Block(S4Layer(16)) for _ in range(2)]
        >>> norm = nn.LayerNorm(16)
        >>> model = S4Model(nn.Linear(3, 16), blocks, nn.Linear(16, 10), norm=norm, pooling="mean")
        >>> model(torch.randn(8, 100, 3)).shape
        torch.Size([8, 10])
    """

    def __init__(
        self,
        encoder: nn.Module,
        blocks: Iterable[S4Block],
        decoder: nn.Module,
        *,
        norm: nn.Module | None = None,
        pooling: str = "none",
    ) -> None:
        super().__init__()
        check_module("encoder", encoder)
        check_module("decoder", decoder)
        if norm is not None:
            check_module("norm", norm)
        if not isinstance(blocks, Iterable):
            raise TypeError(f"blocks must be a sequence of S4Block, got {type(blocks).__name__}")
        stack = list(blocks)
        if not stack or not all(isinstance(block, S4Block) for block in stack):
            raise TypeError(f"blocks must be one or more S4Block, got {[type(b).__name__ for b in stack]}")
        if len({block.layer.d_model for block in stack}) > 1:
            raise ValueError(f"blocks must share one d_model, got {[b.layer.d_model for b in stack]}")
        check_option("pooling", pooling, ("none", "mean", "last"))
        d_model = stack[0].layer.d_model
        _check_width("encoder", encoder, -1, ("out_features", "embedding_dim", "normalized_shape"), d_model)
        _check_width("norm", norm, -1, ("normalized_shape", "num_features"), d_model)
        _check_width("decoder", decoder, 0, ("in_features", "normalized_shape"), d_model)
        self.encoder = encoder
        self.blocks: Sequence[S4Block] = nn.ModuleList(stack)  # type: ignore[assignment]
        self.norm = norm
        self.decoder = decoder
        self.pooling = pooling

    def config(self) -> dict[str, Any]:
        """What the model is made of: "encoder", "blocks", "decoder", "norm" and "pooling".

        Blocks are described by their options. Linear, Embedding, norms, activations, Dropout and Identity of
        torch, and a Sequential of such, are described by their arguments; any other module by the name of its
        class alone.

        Returns:
            a dict that JSON can hold.

        Raises:
            ValueError: a block of which a part was replaced.

        Examples:
            >>> model = S4Model(nn.Embedding(50, 16), [S4Block(S4Layer(16))], nn.Linear(16, 50))
            >>> model.config()["encoder"]["type"], len(model.config()["blocks"])
            ('Embedding', 1)
        """
        return {
            "encoder": described(self.encoder),
            "blocks": [described_part(each, S4Block, f"blocks.{i}") for i, each in enumerate(self.blocks)],
            "decoder": described(self.decoder),
            "norm": described(self.norm),
            "pooling": self.pooling,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], modules: Modules | None = None) -> "S4Model":
        """A new model that `config()` describes.

        Args:
            config: as `config()` returns it, or JSON of that.
            modules: "encoder", "norm" or "decoder" in place of what the config says, needed where that is the
                name of a class alone; in a Sequential "encoder.0", and so on.

        Returns:
            the model, with new numbers, but for those of the modules that were given.

        Raises:
            ValueError, TypeError: a module that has to be given, or an option that does not exist.
        """
        check_known(config, ("encoder", "blocks", "decoder", "norm", "pooling"), cls.__name__)
        parts = {name: built(config.get(name), name, modules) for name in ("encoder", "norm", "decoder")}
        check_unused(modules, parts, cls.__name__)
        blocks = [S4Block.from_config(each) for each in config.get("blocks", ())]
        return cls(blocks=blocks, pooling=config.get("pooling", "none"), **parts)  # type: ignore[arg-type]

    def forward(
        self,
        u: Sequences,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        rate: float | Tensor = 1.0,
        return_state: bool = False,
    ) -> Sequences | tuple[Sequences, State]:
        """Outputs for a batch of sequences.

        Args:
            u: inputs (B, L, ...) as the encoder takes them, or a PackedSequence of such, without `lengths`.
            state: to go on from, as `step` or an earlier `forward` returned it; None is the initial state.
            lengths: (B,) integers, the lengths of right-padded sequences; what lies past them is ignored and
                outputs there are zero.
            resets: (B, L) booleans. At True a new sequence begins: nothing passes from before that input to
                behind it, or back, and pooling is of what comes behind the last.
            rate: multiplies dt in every layer; a number, (B,) or (B, L) as in `S4Layer.forward`.
            return_state: also return the state after the last input.

        Returns:
            outputs (B, L, ...) without pooling, packed as u is, else (B, ...); or (outputs, state).

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.

        Examples:
            >>> model = S4Model(nn.Linear(3, 16), [S4Block(S4Layer(16))], nn.Linear(16, 10), pooling="last")
            >>> y, state = model(torch.randn(8, 100, 3), lengths=torch.arange(93, 101), return_state=True)
            >>> y.shape, state.length[:2]
            (torch.Size([8, 10]), tensor([93, 94]))
        """
        if isinstance(u, PackedSequence):
            return distributed.packed(S4Model.forward, self, u, state, lengths, resets, rate, return_state)
        if not isinstance(u, Tensor) or u.dim() < 2:
            raise ValueError(f"u must be a tensor of shape (batch, length, ...), got {kind_of(u)}")
        given = u, state, lengths, resets, rate
        piece = distributed.piece(self, *given, return_state) if distributed.engaged else None
        if lengths is not None:
            L = u.shape[1] if piece is None else piece.total
            lengths = check_lengths(lengths, u.shape[0], L, u)
        if resets is not None:
            found = check_resets(resets, u.shape[0], u.shape[1], u)
            resets = found if piece is None else resets  # given on all ranks, or on none
        x, layers = self._run(u, state, lengths, resets, rate, return_state, piece)
        after = None
        if return_state or self.pooling == "mean":
            after = self._pool(x, layers, state, lengths, resets, piece)
        if after is not None and self.pooling == "mean":
            y = self._decoded(mean(after).to(x.dtype))
        elif self.pooling == "last":
            y = self._decoded(_last(x, lengths) if piece is None else piece.last(x, lengths))
        else:
            y = self._decoded(x)
            if lengths is not None:
                y = zero_padding(y, lengths if piece is None else piece.own(lengths))
        return (y, after) if return_state and after is not None else y

    def step(self, u: Tensor, state: State, *, rate: float | Tensor = 1.0) -> tuple[Tensor, State]:
        """One time step.

        Args:
            u: inputs (B, ...) of one position.
            state: from `initial_state`, `forward` or an earlier `step`.
            rate: multiplies dt in every layer; a number, or (B,) the step of time before each input.

        Returns:
            outputs (B, ...) as `forward` gives them at this position or, pooled, for the sequence up to here;
            and the next state.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination, or a bidirectional layer; the message
                names the argument.

        Examples:
            >>> model = S4Model(nn.Linear(3, 16), [S4Block(S4Layer(16))], nn.Linear(16, 10)).eval()
            >>> y, state = model.step(torch.randn(8, 3), model.initial_state(8))
            >>> y.shape
            torch.Size([8, 10])
        """
        if not isinstance(u, Tensor) or u.dim() < 1:
            raise ValueError(f"u must be a tensor of shape (batch, ...), got {kind_of(u)}")
        self._check_state(state, u.shape[0])
        if distributed.engaged:
            distributed.refuse("step")
        if hooked(self):
            y, after = self(u[:, None], state, rate=rate, return_state=True)
            return y[:, 0] if self.pooling == "none" else y, after
        x = self._encoded(u[:, None])[:, 0]
        layers = []
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            x, layer_state = block.step(x, layer_state, rate=rate)
            layers.append(layer_state)
        if self.norm is not None:
            x = normed(self.norm, x[:, None], None)[:, 0]
        after = State(tuple(layers), state.total + x.to(state.total.dtype), state.length + 1)
        return self._decoded(mean(after).to(x.dtype) if self.pooling == "mean" else x), after

    def initial_state(self, batch_size: int) -> State:
        """The state before any input.

        Args:
            batch_size: B, 0 or more.

        Returns:
            a `State` of zeros.

        Raises:
            ValueError, TypeError: a batch size that is none, or a bidirectional layer.
        """
        layers = tuple(block.initial_state(batch_size) for block in self.blocks)
        total = layers[-1].new_zeros(layers[-1].shape[:2])
        return State(layers, total, torch.zeros(batch_size, dtype=torch.long, device=total.device))

    def generate(
        self,
        prompt: Tensor,
        steps: int,
        sample: Sampler | None = None,
        *,
        stop: int | Stop | None = None,
        pad: float | int = 0,
        state: State | None = None,
        lengths: Tensor | None = None,
        rate: float | Tensor = 1.0,
    ) -> Tensor:
        """Go on from a prompt, feeding every output back as the next input. Call `eval` first.

        The prompt is one `forward`, whatever its length; every new input then costs one `step`. In training
        mode dropout and batch norm act as they do in training. Sharded by FSDP2, all ranks have to make as
        many steps; a policy of mixed precision needs `cast_forward_inputs=False`, as states are not rounded.

        Args:
            prompt: (B, L, ...) inputs as the encoder takes them, L at least 1.
            steps: how many to generate, at least 1.
            sample: from the decoder's output (B, ...) to the next input (B, ...), for tokens or for real
                numbers: a mean, or a draw from the density that the output parametrises. None is `greedy`,
                for tokens; `categorical()` draws them.
            stop: what ends a sequence: a token, or a function from the next input (B, ...) to booleans (B,).
            pad: stands in the result behind the input that ended a sequence.
            state: that the prompt goes on from, as `forward` or `step` returned it.
            lengths: (B,) integers from 1, the lengths of right-padded prompts.
            rate: multiplies dt in every layer; a number, or (B,), one for each sequence.

        Returns:
            the new inputs (B, n, ...), prompt excluded; n is `steps`, or fewer if all sequences ended.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.

        Examples:
            >>> model = S4Model(nn.Embedding(50, 16), [S4Block(S4Layer(16))], nn.Linear(16, 50)).eval()
            >>> prompt = torch.randint(50, (4, 20))
            >>> model.generate(prompt, steps=8).shape  # the most likely tokens
            torch.Size([4, 8])
            >>> model.generate(prompt, 8, categorical(0.8, top_p=0.9), stop=0).shape[0]
            4
        """
        check_integer("steps", steps, 1)
        new = self.stream(prompt, sample, stop=stop, pad=pad, state=state, lengths=lengths, rate=rate)
        return torch.stack(list(islice(new, steps)), 1)

    def stream(
        self,
        prompt: Tensor,
        sample: Sampler | None = None,
        *,
        stop: int | Stop | None = None,
        pad: float | int = 0,
        state: State | None = None,
        lengths: Tensor | None = None,
        rate: float | Tensor = 1.0,
    ) -> Iterator[Tensor]:
        """`generate` as an iterator, without end unless `stop` ends all sequences; each step costs the same.

        The prompt is run at the call, which raises what there is to raise; later inputs wait for `next`.

        Args:
            prompt, sample, stop, pad, state, lengths, rate: as in `generate`.

        Returns:
            an iterator of new inputs (B, ...).

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.

        Examples:
            >>> model = S4Model(nn.Embedding(50, 16), [S4Block(S4Layer(16))], nn.Linear(16, 50)).eval()
            >>> tokens = model.stream(torch.randint(50, (4, 20)))
            >>> next(tokens).shape
            torch.Size([4])
        """
        if distributed.engaged:
            distributed.refuse("generation")
        if self.pooling != "none":
            raise ValueError(f"generation needs a model with pooling='none', got {self.pooling!r}")
        check_generation(prompt, sample, stop, pad)
        if lengths is not None:
            lengths = check_lengths(lengths, prompt.shape[0], prompt.shape[1], prompt)
            if not unread(lengths) and bool((lengths < 1).any()):
                raise ValueError(f"lengths must be at least 1 to generate, got {lengths.tolist()}")
        with torch.no_grad():
            if hooked(self):  # an output for each position of the prompt, more than is needed
                y, state = self(prompt, state, lengths=lengths, rate=rate, return_state=True)
                y = _last(y, lengths)
            else:
                x, layers = self._run(prompt, state, lengths, None, rate, True)
                state = self._pool(x, layers, state, lengths, None)
                y = self._decoded(_last(x, lengths))
        step = partial(self.step, rate=rate)
        return feed_back(step, prompt[:, 0], y, state, greedy if sample is None else sample, stop, pad)

    def _encoded(self, u: Tensor) -> Tensor:
        x = _through(self.encoder, "u, the input of the encoder,", u)
        check_features("the output of the encoder", x, self.blocks[0].layer.d_model, "batch", "length")
        return x

    def _decoded(self, x: Tensor) -> Tensor:
        return _through(self.decoder, "the input of the decoder", x)

    def _run(
        self,
        u: Tensor,
        state: State | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        rate: float | Tensor,
        return_state: bool,
        piece: Piece | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs of the last block (B, L, d_model), zero past the lengths, and the layers' states."""
        if state is not None:
            self._check_state(state, u.shape[0])
        own = lengths if piece is None or lengths is None else piece.own(lengths)
        if own is not None:
            u = zero_padding(u, own)
        x, layers = self._encoded(u), []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.layers[i]
            x = block(x, before, lengths=lengths, resets=resets, rate=rate, return_state=return_state)
            if return_state:
                x, after = x
                layers.append(after)
        if self.norm is not None:
            x = normed(self.norm, x, own, piece)
        if own is not None:
            x = zero_padding(x, own)
        return x, tuple(layers)

    def _pool(
        self,
        x: Tensor,
        layers: tuple[Tensor, ...],
        before: State | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        piece: Piece | None = None,
    ) -> State:
        """The state after the outputs x (B, L, d_model) of the last block, zero past the lengths."""
        L, offset = (x.shape[1], 0) if piece is None else (piece.total, piece.offset)
        length = torch.full(x.shape[:1], L, device=x.device) if lengths is None else lengths
        if resets is not None or (piece is not None and piece.cut):  # of the last segment alone
            t = offset + torch.arange(x.shape[1], device=x.device)
            last = torch.full_like(length, -1)
            if resets is not None and x.shape[1]:
                last = torch.where(resets & (t < length[:, None]), t, -1).amax(1)
            if piece is not None:
                last = piece.largest(last)
            start = last.clamp(min=0)
            x = torch.where((t >= start[:, None])[..., None], x, 0)
            length = length - start
            before = None if before is None else before.reset(last >= 0)
        return state_after(x, layers, before, length, piece)

    def _check_state(self, state: State, batch: int) -> None:
        valid = isinstance(state, State) and isinstance(state.layers, tuple)
        if not valid or len(state.layers) != len(self.blocks):
            got = f"one of {len(state.layers)}" if valid else type(state).__name__
            raise ValueError(
                f"state must be a State of {len(self.blocks)} layers, as initial_state, forward and "
                f"step return it, got {got}"
            )
        for i, (x, block) in enumerate(zip(state.layers, self.blocks, strict=True)):
            shape = (batch, block.layer.d_model, block.layer.d_state)
            check_state(f"state.layers[{i}]", x, shape, x)  # its dtype and device are its layer's to check
        check_state("state.total", state.total, x.shape[:2], x)
        check_state("state.length", state.length, (batch,), x, torch.int64)


def _check_width(
    name: str, module: nn.Module | None, end: int, attributes: tuple[str, ...], d_model: int
) -> None:
    """The width that meets the blocks, where a module or this end of a sequence of them tells it."""
    while type(module) is nn.Sequential and len(module):
        module = module[end]
    for attribute in attributes:
        width = getattr(module, attribute, 0)
        if isinstance(width, (int, tuple)) and width not in (0, d_model, (d_model,)):  # 0: not known yet
            raise ValueError(f"{name} must have the blocks' d_model={d_model}, got {attribute}={width}")


def _through(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """module(x), with an error that names x where its kind or its width does not suit the module."""
    try:
        out: Tensor = module(x)
    except RuntimeError as error:
        check_kind(name, x, module.parameters(), error)
        first = module[0] if type(module) is nn.Sequential and len(module) else module
        if type(first) is nn.Linear and x.shape[-1:] != (first.in_features,):
            raise ValueError(
                f"{name} must have shape (..., {first.in_features}), got {tuple(x.shape)}"
            ) from error
        raise
    return out


def state_after(
    x: Tensor, layers: tuple[Tensor, ...], before: State | None, length: Tensor, piece: Piece | None = None
) -> State:
    """The state of a stack, from the outputs x (B, L, d_model) of its last block for `length` (B,) inputs.

    At all other positions x is zero.
    """
    total = x.sum(1, dtype=layers[-1].dtype if layers else torch.promote_types(x.dtype, torch.float32))
    if piece is not None:
        total = piece.sum(total)
    if before is not None:
        total, length = total + before.total, length + before.length
    return State(layers, total, length)


def mean(state: State) -> Tensor:
    """(B, d_model), the mean of the last block's outputs so far; 0 before any."""
    return state.total / state.length.clamp(min=1)[:, None]


def _last(x: Tensor, lengths: Tensor | None) -> Tensor:
    if x.shape[1] == 0:
        raise ValueError("pooling='last' needs sequences of at least one position")
    if lengths is None:
        return x[:, -1]
    return x[torch.arange(x.shape[0], device=x.device), (lengths - 1).clamp(min=0)]
