"""ListOps: the published grammar and limits, values by an evaluator of its own."""

import statistics
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from random import Random

import pytest
import torch

pytest.importorskip("rich", reason="the examples need the extra 'examples'")

from data import listops
from data.listops import Limits, generate, read

SMALL = Limits(min_length=20, max_length=60, max_depth=5, max_arguments=4)
FUNCTIONS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def evaluate(tokens: list[str]) -> tuple[int, int, list[int]]:
    """Value of an expression, its depth, and the numbers of arguments of its operators."""
    rest = iter(tokens)
    arguments = []

    def node() -> tuple[int | None, int]:
        token = next(rest)
        if token == "]":
            return None, 0
        if token.isdigit():
            return int(token), 1
        values, depth = [], 0
        while (child := node())[0] is not None:
            values.append(child[0])
            depth = max(depth, child[1])
        arguments.append(len(values))
        return FUNCTIONS[token](values), depth + 1

    value, depth = node()
    assert not list(rest)
    return value, depth, arguments


def expressions(data: dict[str, torch.Tensor]) -> list[list[str]]:
    """The expressions as lists of tokens."""
    ends = data["offsets"].tolist()
    return [
        [listops.VOCABULARY[code] for code in data["tokens"][begin:end].tolist()]
        for begin, end in pairwise(ends)
    ]


def nested(generator: Random, depth: int, limits: Limits) -> list[str]:
    """An expression by the published recursion: 3 of 4 nodes are digits, at the last depth all."""
    if depth == limits.max_depth or generator.random() > 0.25:
        return [str(generator.randrange(10))]
    children = [
        nested(generator, depth + 1, limits) for _ in range(generator.randint(2, limits.max_arguments))
    ]
    return [generator.choice(list(FUNCTIONS)), *chain(*children), "]"]


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Expressions of the published limits."""
    return generate(0, 150, workers=1)


def test_published_limits(published: dict[str, torch.Tensor]) -> None:
    assert published["tokens"].dtype == torch.uint8
    assert published["offsets"].dtype == published["labels"].dtype == torch.int64
    assert published["offsets"][0] == 0
    assert published["offsets"][-1] == len(published["tokens"])
    depths, counts = Counter(), Counter()
    for tokens, label in zip(expressions(published), published["labels"].tolist(), strict=True):
        assert 500 < len(tokens) < 2000
        value, depth, arguments = evaluate(tokens)
        assert value == label
        depths[depth] += 1
        counts.update(arguments)
    assert max(depths) == 10
    assert set(counts) == set(range(2, 11))
    assert listops.SPLITS == {"train": 96_000, "val": 2_000, "test": 2_000}


def test_values_and_tight_limits() -> None:
    """Both bounds of the length are exclusive, all lengths between them come."""
    data = generate(1, 600, limits=SMALL._replace(max_length=30), workers=1)
    assert [evaluate(tokens)[0] for tokens in expressions(data)] == data["labels"].tolist()
    assert {len(tokens) for tokens in expressions(data)} == set(range(21, 30))


def test_median_is_rounded_down() -> None:
    data = generate(2, 200, limits=Limits(1, 5, 2, 2), workers=1)
    pairs = zip(expressions(data), data["labels"].tolist(), strict=True)
    medians = [(tokens[1:3], label) for tokens, label in pairs if tokens[0] == "[MED"]
    assert len(medians) > 20
    assert all(label == (int(a) + int(b)) // 2 for (a, b), label in medians)


def test_as_the_published_recursion() -> None:
    """Lengths, depths, arguments, operators and values are distributed as those of the recursion."""
    generator, expected = Random(0), {}
    while len(expected) < 1500:
        tokens = nested(generator, 1, SMALL)
        if SMALL.min_length < len(tokens) < SMALL.max_length:
            expected[" ".join(tokens)] = tokens
    found = expressions(generate(3, 1500, limits=SMALL, workers=1))
    statistic = {
        "length": len,
        "depth": lambda tokens: evaluate(tokens)[1],
        "arguments": lambda tokens: statistics.mean(evaluate(tokens)[2]),
        "value": lambda tokens: evaluate(tokens)[0],
        "digits": lambda tokens: sum(int(token) for token in tokens if token.isdigit()),
        **{f"root {name}": lambda tokens, name=name: float(tokens[0] == name) for name in FUNCTIONS},
        **{
            f"value {value}": lambda tokens, value=value: float(evaluate(tokens)[0] == value)
            for value in range(10)
        },
    }
    for name, function in statistic.items():
        samples = [[float(function(tokens)) for tokens in side] for side in (found, list(expected.values()))]
        (a, b), spread = map(statistics.mean, samples), statistics.stdev(samples[0] + samples[1])
        assert abs(a - b) < 4 * spread * (2 / 1500) ** 0.5, name


def test_no_expression_twice() -> None:
    """Of pairs of digits there are 400: all of them come, each once, and a further one is refused."""
    limits = Limits(min_length=1, max_length=5, max_depth=2, max_arguments=2)
    found = {" ".join(tokens) for tokens in expressions(generate(0, 390, limits=limits, workers=1))}
    assert len(found) == 390
    with pytest.raises(ValueError, match="no more than 400 of 401"):
        generate(0, 401, limits=limits, workers=1)


def test_seed_decides_not_the_processes() -> None:
    one, two = (generate(4, 450, limits=SMALL, workers=workers) for workers in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    shorter, other = generate(4, 20, limits=SMALL, workers=1), generate(5, 20, limits=SMALL, workers=1)
    assert expressions(shorter) == expressions(one)[:20]
    assert not {tuple(tokens) for tokens in expressions(other)} & {tuple(x) for x in expressions(shorter)}


def test_reads_published_files(tmp_path: Path) -> None:
    """In the published form each argument closes a pair of parentheses, and lines end as csv's do."""
    file = tmp_path / "basic_val.tsv"
    rows = ["( ( ( [MAX 2 ) 9 ) ] )\t9", "( ( ( ( [SM 8 ) ( ( ( [MED 1 ) 4 ) ] ) ) 7 ) ] )\t7"]
    file.write_bytes("\r\n".join(["Source\tTarget", *rows, ""]).encode())
    data = read(file)
    assert [" ".join(tokens) for tokens in expressions(data)] == ["[MAX 2 9 ]", "[SM 8 [MED 1 4 ] 7 ]"]
    assert data["labels"].tolist() == [9, 7]
    assert [evaluate(tokens)[0] for tokens in expressions(data)] == [9, 7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected the columns Source and Target"),
        ("Source\tTarget\n( ( [MAX 2 ) ] )\t12\n", "line 2: expected an expression"),
        ("Source\tTarget\n5\t5\n( ( [AVG 2 ) ] )\t2\n", "line 3: expected an expression"),
        ("Source\tTarget\n5\n", "line 2: expected an expression"),
    ],
)
def test_says_what_a_file_should_hold(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "basic_val.tsv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read(file)


@pytest.mark.parametrize("limits", [Limits(500, 501), Limits(max_depth=1), Limits(max_arguments=1)])
def test_impossible_limits(limits: Limits) -> None:
    with pytest.raises(ValueError, match="max_length >= min_length"):
        generate(0, 1, limits=limits, workers=1)


def test_limits_that_no_tree_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listops, "_TREES", 1000)
    with pytest.raises(ValueError, match="none of 1000 random trees"):
        generate(0, 1, limits=Limits(500, 2000, max_depth=2), workers=1)


def test_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonargparse", reason="the examples need the extra 'examples'")
    import listops as example

    example.main(count=2, max_length=40)
    shown = capsys.readouterr().out
    assert "value" in shown
    assert shown.count("]") >= 2
