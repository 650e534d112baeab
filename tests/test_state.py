"""State: its rows go on as their sequences do, wherever it was kept and however it was put together."""

import copy
import io
import itertools
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from refusals import EITHER, Kind, refuses
from stacks import (
    D_MODEL,
    D_STATE,
    VOCABULARY,
    L,
    in_steps,
    incoming,
    inputs,
    one_block_state,
    same,
    small,
    tensors,
    trained,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from s4 import State


def test_state_of_the_stack() -> None:
    model = trained()
    state = model.initial_state(4)
    assert isinstance(state, State)
    assert [tuple(x.shape) for x in tensors(state)] == [(4, D_MODEL, D_STATE)] * 2 + [(4, D_MODEL), (4,)]
    assert all((x == 0).all() for x in tensors(state))
    _, state = model(inputs(4), state, lengths=torch.tensor([L, 1, 0, 5]), return_state=True)
    assert state.length.tolist() == [L, 1, 0, 5]


ROWS = [
    ([2, 0, 0, 1], [2, 0, 0, 1]),
    ((2, -3), [2, 0]),
    ([], []),
    (torch.tensor([1]), [1]),
    (torch.tensor([1, 0], dtype=torch.uint8), [1, 0]),
    (torch.tensor([True, False, True]), [0, 2]),
    (slice(1, None), [1, 2]),
    (slice(0, 0), []),
]


@pytest.mark.parametrize(("rows", "numbers"), ROWS, ids=str)
def test_selected_rows_go_on_as_their_sequences(rows: Tensor | list[int] | slice, numbers: list[int]) -> None:
    """Any index of the batch: as a beam search reorders, repeats and drops its hypotheses."""
    model = trained("mixed", "prenorm", "mean", tokens=True)
    u = inputs(3, True)
    _, state = model(u[:, :10], return_state=True)
    chosen = u[torch.tensor(numbers).long()]
    want, last = model(chosen, return_state=True)
    got, also = in_steps(model, chosen[:, 10:], state.select(rows))
    oracle.close(got[:, -1], want, 1e-9)
    same(also, last)


def test_beam_search_of_full_width_finds_the_best_sequence() -> None:
    model, steps = trained(tokens=True), 3
    prompt = inputs(1, True, 5)
    every = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=steps)))
    logits = model(torch.cat([prompt.expand(len(every), -1), every], 1))
    log_p = torch.log_softmax(logits[:, prompt.shape[1] - 1 : -1], -1)
    want = every[log_p.gather(-1, every[..., None])[..., 0].sum(1).argmax()]
    logits, state = model(prompt, return_state=True)
    found, score = torch.zeros(1, 0, dtype=torch.long), torch.log_softmax(logits[:, -1], -1)
    for step in range(steps):
        best = score.flatten().argsort(descending=True)
        parent, token = best // VOCABULARY, best % VOCABULARY
        found = torch.cat([found[parent], token[:, None]], 1)
        if step < steps - 1:
            y, state = model.step(token, state.select(parent))
            score = score[parent, token][:, None] + torch.log_softmax(y, -1)
    assert torch.equal(found[0], want)


@pytest.mark.parametrize(("rows", "numbers"), ROWS, ids=str)
def test_reset_rows_are_new_and_the_others_go_on(
    rows: Tensor | list[int] | slice, numbers: list[int]
) -> None:
    """Whatever was in them: an overflow in one sequence is over with it."""
    model = trained("mixed", "prenorm", "mean", tokens=True)
    u = inputs(3, True)
    _, before = model(u[:, :10], return_state=True)
    layers = tuple(x.clone() for x in before.layers)
    spoilt = State(layers, before.total.clone(), before.length.clone())
    for x in (*spoilt.layers, spoilt.total):
        x[numbers] = math.nan
    state = spoilt.reset(rows)
    for kept in set(range(3)) - set(numbers):
        same(state.select([kept]), before.select([kept]), 0)
    same(state.select(numbers), model.initial_state(len(numbers)), 0)
    assert all(x[numbers].isnan().all() for x in (*spoilt.layers, spoilt.total))
    assert [x.dtype for x in tensors(state)] == [x.dtype for x in tensors(before)]
    y, last = model(u[:, 10:], state, return_state=True)
    for b in range(3):
        alone = u[b : b + 1, 10 if b in numbers else 0 :]
        want, after = model(alone, return_state=True)
        oracle.close(y[b : b + 1], want, 1e-9)
        same(last.select([b]), after)


def test_no_gradient_enters_a_reset_row() -> None:
    state = incoming(trained("mixed", "prenorm", "mean"))
    new = state.reset([1])
    parts = [*state.layers, state.total]
    found = torch.autograd.grad(sum(x.sum() for x in (*new.layers, new.total)), parts)
    for grad in found:
        assert (grad[1] == 0).all()
        assert (grad[[0, 2]] == 1).all()


def test_a_detached_state_has_no_history() -> None:
    model = trained("mixed", "prenorm", "mean")
    _, state = model(inputs(), return_state=True)
    assert state.total.requires_grad
    cut = state.detach()
    same(cut, state, 0)
    assert not any(x.requires_grad for x in tensors(cut))
    assert all(x.requires_grad for x in (*state.layers, state.total))
    u = inputs().requires_grad_()
    model(u, cut).sum().backward()
    assert u.grad.abs().max() > 0


def test_a_clone_is_a_copy_with_the_same_history() -> None:
    """What is written into the one, as into a buffer of a graph that is replayed, is not in the other."""
    state = incoming(trained("mixed", "prenorm", "mean"))
    twin = state.clone()
    assert isinstance(twin, State)
    same(twin, state, 0)
    parts = [*state.layers, state.total]
    for grad in torch.autograd.grad(sum(x.sum() for x in (*twin.layers, twin.total)), parts):
        assert (grad == 1).all()
    before = copy.deepcopy(state)
    for x in tensors(twin):
        x.detach().fill_(7)
    same(state, before, 0)
    assert all((x == 7).all() for x in tensors(twin))


def test_a_state_is_a_tree_of_tensors() -> None:
    """What torch.compile, torch.export and data parallel see in it."""
    state = incoming(trained())
    leaves, spec = pytree.tree_flatten(state)
    assert all(leaf is x for leaf, x in zip(leaves, tensors(state), strict=True))
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, State)
    assert again._fields == ("layers", "total", "length")
    assert isinstance(pytree.tree_map(lambda x: x[:1], state), State)


def test_a_state_goes_through_export() -> None:
    class Step(nn.Module):
        """One step, in which a sequence starts anew."""

        def __init__(self) -> None:
            super().__init__()
            self.model = trained("mixed", "prenorm", "mean")

        def forward(self, u: Tensor, state: State, new: Tensor) -> tuple[Tensor, State]:
            return self.model.step(u, state.reset(new).detach())

    one = Step().eval()
    arguments = inputs()[:, 0], incoming(one.model).detach(), torch.tensor([True, False, True])
    file = io.BytesIO()
    torch.export.save(torch.export.export(one, arguments), file)
    file.seek(0)
    program = torch.export.load(file)
    others = inputs()[:, 0], incoming(one.model).detach(), torch.tensor([False, False, True])
    for case in (arguments, others):
        want, want_state = one(*case)
        y, state = program.module()(*case)
        assert isinstance(state, State)
        oracle.close(y, want, 1e-12)
        same(state, want_state, 1e-12)


def reloaded(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file)


def test_a_state_is_saved_moved_and_put_together() -> None:
    model = trained("mixed", "prenorm", "mean")
    state = incoming(model, 5)
    for twin in (
        reloaded(state),
        reloaded({"step": 3, "states": [state]})["states"][0],
        State(**reloaded(state._asdict())),
        State(*state),
        pickle.loads(pickle.dumps(state)),
        copy.deepcopy(state),
        State.cat([state.select([0]), state.select(slice(1, 4)), state.select([4])]),
    ):
        assert isinstance(twin, State)
        same(twin, state, 0)
        model.step(inputs(5)[:, 0], twin)
    narrow = state.to(dtype=torch.float32)
    assert [x.dtype for x in tensors(narrow)] == [torch.float32] * 3 + [torch.int64]
    same(state.to(torch.float32), narrow, 0)
    same(narrow.to(torch.device("cpu"), torch.float64), state, 1e-6)
    model.float().step(inputs(5)[:, 0].float(), narrow)
    assert all(x.device.type == "meta" for x in tensors(state.to("meta")))


T = torch.zeros(2, 5, dtype=torch.long)
ERRORS: dict[str, tuple[Callable[[], Any], Kind, str]] = {
    "one row of a state": (lambda: small().initial_state(2).select(1), EITHER, "rows.*1"),
    "half a row of a state": (lambda: small().initial_state(2).select([0.5]), EITHER, r"rows.*0\.5"),
    "rows of halves": (lambda: small().initial_state(2).select(slice(0.5)), ValueError, r"rows.*slice.*0\.5"),
    "rows backwards": (
        lambda: small().initial_state(2).select(slice(None, None, -1)),
        ValueError,
        "rows.*forwards.*-1",
    ),
    "rows in a table": (lambda: small().initial_state(2).select(T), ValueError, "rows"),
    "rows a word": (lambda: small().initial_state(2).select("ab"), ValueError, "rows.*'ab'"),
    "no rows": (lambda: small().initial_state(2).select(None), ValueError, "rows.*None"),
    "ragged rows": (lambda: small().initial_state(2).select([[0], [0, 1]]), ValueError, r"rows.*\[\[0\]"),
    "three truths for two rows": (
        lambda: small().initial_state(2).select([True, True, False]),
        ValueError,
        "rows.*2 booleans.*3",
    ),
    "a row too far": (
        lambda: small().initial_state(2).select([0, 2, -3]),
        IndexError,
        r"rows.*-2\.\.1.*\[2, -3\]",
    ),
    "reset one row": (lambda: small().initial_state(2).reset(1), ValueError, "rows.*1"),
    "reset half a row": (lambda: small().initial_state(2).reset([0.5]), ValueError, r"rows.*0\.5"),
    "reset a row too far": (lambda: small().initial_state(2).reset([2]), IndexError, r"rows.*\[2\]"),
    "to two dtypes": (
        lambda: small().initial_state(2).to(torch.float64, torch.float32),
        ValueError,
        "device.*torch.float64",
    ),
    "to no device": (lambda: small().initial_state(2).to("gpu"), ValueError, "device.*'gpu'"),
    "to a flag": (lambda: small().initial_state(2).to(True), ValueError, "device.*True"),
    "to integers alone": (lambda: small().initial_state(2).to(torch.int64), TypeError, "dtype.*torch.int64"),
    "to integers": (lambda: small().initial_state(2).to(dtype=torch.int64), TypeError, "dtype.*torch.int64"),
    "to complex numbers": (
        lambda: small().initial_state(2).to(dtype=torch.complex64),
        TypeError,
        "dtype.*torch.complex64",
    ),
    "to a word as dtype": (lambda: small().initial_state(2).to(dtype="float"), TypeError, "dtype.*'float'"),
    "no states": (lambda: State.cat([]), ValueError, "states.*one or more.*none"),
    "one state to put together": (
        lambda: State.cat(small().initial_state(2)),
        TypeError,
        "states.*sequence of State.*got State",
    ),
    "tensors to put together": (
        lambda: State.cat([T]),
        TypeError,
        r"states.*sequence of State.*\['Tensor'\]",
    ),
    "a number to put together": (lambda: State.cat(5), TypeError, "states.*sequence of State.*int"),
    "states of two stacks": (
        lambda: State.cat([small().initial_state(2), one_block_state()]),
        ValueError,
        "states.*2 layers.*1 layers",
    ),
    "states of two dtypes": (
        lambda: State.cat([one_block_state(), one_block_state().to(dtype=torch.float64)]),
        ValueError,
        "states.*alike.*float32.*float64",
    ),
    "states of two kinds of length": (
        lambda: State.cat([one_block_state(), one_block_state()._replace(length=T[:, 0].int())]),
        ValueError,
        "states.*int64.*int32",
    ),
    "twice": (lambda: one_block_state() * 2, TypeError, "State has no arithmetic.*int"),
    "twice from the left": (lambda: 2 * one_block_state(), TypeError, "State has no arithmetic.*int"),
    "a sum": (lambda: one_block_state() + one_block_state(), TypeError, "no arithmetic.*State"),
    "a sum with a tuple": (
        lambda: operator.add((), one_block_state()),
        TypeError,
        "no arithmetic.*tuple",
    ),
    "states of two widths": (
        lambda: State.cat([one_block_state(), State((torch.zeros(2, 3, 8),), torch.zeros(2, 3), T[:, 0])]),
        ValueError,
        r"states.*\(2, 4, 8\).*\(2, 3, 8\)",
    ),
    "states of two devices": (
        lambda: State.cat([one_block_state(), one_block_state().to("meta")]),
        ValueError,
        "states.*cpu.*meta",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "kind", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], Any], kind: Kind, match: str) -> None:
    refuses(kind, match, call)
