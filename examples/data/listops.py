"""ListOps of the Long Range Arena: nested lists of digits under MIN, MAX, MED and SM, and their values.

Made as the benchmark defines it (Tay et al., arXiv 2011.04006; lra_benchmarks/data/listops.py of
github.com/google-research/long-range-arena at commit 29833a1), or read from its published files.
`python examples/listops.py --count 3` prints some.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.parallel import run_blocks

if TYPE_CHECKING:  # the processes that make examples do without
    from torch import Tensor

PAD = 0
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")  # SM: sum modulo 10
END = "]"
# By number. The benchmark's parentheses repeat the nesting, and its tokenizer drops them.
VOCABULARY = ("", *OPERATORS, END, *"0123456789")
CLASSES = 10
SPLITS = {"train": 96_000, "val": 2_000, "test": 2_000}
MAX_DEPTH = 10  # of a tree, a digit alone being of depth 1
MAX_ARGUMENTS = 10  # of an operator, at least 2
NESTED = 0.25  # probability that a node above MAX_DEPTH is an operator
MIN_LENGTH, MAX_LENGTH = 500, 2000  # tokens, both exclusive

_END = VOCABULARY.index(END)
_ZERO = VOCABULARY.index("0")
_BLOCK = 200  # examples a worker makes at a time
_ATTEMPTS = 1000  # draws of an example that differs from those before it
_TREES = 100_000  # draws of a tree; one in twelve is within the published limits


class Limits(NamedTuple):
    """Of an expression: exclusive bounds of its tokens, depth of its tree, arguments of an operator."""

    min_length: int = MIN_LENGTH
    max_length: int = MAX_LENGTH
    max_depth: int = MAX_DEPTH
    max_arguments: int = MAX_ARGUMENTS


PUBLISHED = Limits()


def generate(
    seed: int, count: int = sum(SPLITS.values()), *, limits: Limits = PUBLISHED, workers: int | None = None
) -> dict[str, "Tensor"]:
    """Random expressions, no two the same, with their values; the same for a seed on any number of processes.

    Drawn independently: the first 96,000 are to train, the next 2,000 to validate, the last 2,000 to test.

    Args:
        seed: of the expressions.
        count: expressions, n.
        limits: of each.
        workers: processes; None for one a core.

    Returns:
        `tokens` uint8 (total,), all expressions one behind the other, numbers of VOCABULARY; `offsets` int64
        (n + 1,), where each begins, and the end; `labels` int64 (n,), 0 to 9.

    Raises:
        ValueError: for limits that leave no expression, or fewer than `count`.
    """
    low, high, depth, arguments = limits
    if depth < 2 or arguments < 2 or high <= max(low + 1, 4):
        raise ValueError(
            "need max_depth >= 2, max_arguments >= 2, max_length >= 5 and max_length >= min_length + 2, "
            f"got {limits}"
        )
    expressions: list[np.ndarray] = []
    labels: list[int] = []
    seen: set[bytes] = set()
    for made in run_blocks(partial(_examples, seed, limits), count, _BLOCK, workers, "making ListOps"):
        for tokens, label in made:
            attempt = 0
            while tokens.tobytes() in seen:
                attempt += 1
                if attempt > _ATTEMPTS:
                    raise ValueError(
                        f"no more than {len(seen)} of {count} expressions differ within {limits}"
                    )
                tokens, label = _example(seed, len(labels), attempt, limits)
            seen.add(tokens.tobytes())
            expressions.append(tokens)
            labels.append(label)
    return _packed(expressions, labels)


def read(file: Path) -> dict[str, "Tensor"]:
    """What `generate` returns, from a published file such as basic_train.tsv with columns Source and Target.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds something else.
    """
    # From a character to its token, once operators are one character too; 255 for what is none.
    numbers = bytearray(b"\xff" * 256)
    numbers[:_END] = range(_END)
    numbers[ord(END)] = _END
    for digit in range(10):
        numbers[ord("0") + digit] = _ZERO + digit
    expressions, labels = [], []
    with file.open("rb") as lines:
        if (header := next(lines, b"").split()) != [b"Source", b"Target"]:
            raise ValueError(f"{file} begins with {header[:4]}, expected the columns Source and Target")
        for number, line in enumerate(lines, start=2):
            source, _, target = line.strip().partition(b"\t")
            for code, operator in enumerate(OPERATORS, start=1):
                source = source.replace(operator.encode(), bytes([code]))
            tokens = np.frombuffer(source.translate(bytes(numbers), b"() "), np.uint8)
            if not len(tokens) or tokens.max() == 255 or len(target) != 1 or not target.isdigit():
                raise ValueError(
                    f"{file}, line {number}: expected an expression of {' '.join(OPERATORS)} {END} and "
                    f"digits, a tab and a digit, got {line[:30]!r} ... {line[-10:]!r}"
                )
            expressions.append(tokens)
            labels.append(int(target))
    return _packed(expressions, labels)


def text(tokens: np.ndarray) -> str:
    """The expression that tokens (L,) stand for, with spaces between them."""
    return " ".join(VOCABULARY[token] for token in tokens)


def _packed(expressions: list[np.ndarray], labels: list[int]) -> dict[str, "Tensor"]:
    import torch

    lengths = np.array([0, *map(len, expressions)], dtype=np.int64)
    return {
        "tokens": torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *expressions])),
        "offsets": torch.from_numpy(lengths.cumsum()),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def _examples(seed: int, limits: Limits, rows: range) -> list[tuple[np.ndarray, int]]:
    return [_example(seed, row, 0, limits) for row in rows]


def _example(seed: int, row: int, attempt: int, limits: Limits) -> tuple[np.ndarray, int]:
    """Tokens and value of a random expression."""
    generator = np.random.default_rng([seed, row, attempt])
    for _ in range(_TREES):
        if levels := _tree(generator, limits):
            return _written(generator, levels)
    raise ValueError(f"none of {_TREES} random trees is within {limits}")


def _tree(generator: np.random.Generator, limits: Limits) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """A tree, if it has a length within the limits.

    Returns:
        for each depth which of its n nodes, from left to right, are operators (n,), and how many arguments
        each of those has: nodes of the next depth, in the same order.
    """
    levels, nodes, length = [], 1, 0
    for depth in range(1, limits.max_depth + 1):
        nested = generator.random(nodes) < NESTED if depth < limits.max_depth else np.zeros(nodes, bool)
        arguments = generator.integers(2, limits.max_arguments, np.count_nonzero(nested), endpoint=True)
        levels.append((nested, arguments))
        length += nodes + len(arguments)  # an operator has its END
        nodes = int(arguments.sum())
        if length + nodes >= limits.max_length:
            return None
        if not nodes:
            break
    return levels if length > limits.min_length else None


def _written(
    generator: np.random.Generator, levels: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, int]:
    """A tree with random operators and digits as tokens, and its value."""
    # By depth, the deepest first.
    lengths: list[np.ndarray] = []
    values: list[np.ndarray] = []
    operators: list[np.ndarray] = []
    for nested, arguments in reversed(levels):
        length, value = np.ones(len(nested), np.int64), generator.integers(10, size=len(nested))
        operator = generator.integers(len(OPERATORS), size=len(arguments))
        if len(arguments):
            groups = arguments.cumsum() - arguments
            length[nested] = 2 + np.add.reduceat(lengths[-1], groups)
            value[nested] = _applied(operator, arguments, values[-1])
        lengths.append(length)
        values.append(value)
        operators.append(operator)
    tokens = np.empty(lengths[-1][0], np.uint8)
    starts = np.zeros(1, np.int64)
    for depth, (nested, arguments) in enumerate(levels):
        level = len(levels) - 1 - depth
        tokens[starts[~nested]] = _ZERO + values[level][~nested]
        tokens[starts[nested]] = 1 + operators[level]
        tokens[starts[nested] + lengths[level][nested] - 1] = _END
        if len(arguments):
            before = lengths[level - 1].cumsum() - lengths[level - 1]  # tokens left of a node in its level
            groups = arguments.cumsum() - arguments
            starts = before + np.repeat(starts[nested] + 1 - before[groups], arguments)
    return tokens, int(values[-1][0])


def _applied(operator: np.ndarray, arguments: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values (n,) of n operators, of which each takes as many of `values` as it has arguments."""
    width = int(arguments.max())
    table = np.full((len(arguments), width), 10)
    table[np.arange(width) < arguments[:, None]] = values
    table.sort(axis=1)
    each = np.arange(len(arguments))
    middle = table[each, (arguments - 1) // 2] + table[each, arguments // 2]
    total = np.add.reduceat(values, arguments.cumsum() - arguments)
    return np.choose(operator, (table[:, 0], table[each, arguments - 1], middle // 2, total % 10))
