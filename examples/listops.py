"""Print expressions of ListOps and their values: python examples/listops.py [--options]."""

from data.listops import Limits, generate, text
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from rich.text import Text


def main(count: int = 3, seed: int = 0, max_length: int = 100) -> None:
    """Print expressions and their values.

    Args:
        count: how many.
        seed: of the expressions.
        max_length: they have fewer tokens, and more than half as many.
    """
    made = generate(seed, count, limits=Limits(max_length // 2, max_length), workers=1)
    table = Table("expression", "value", show_lines=True)
    for row, label in enumerate(made["labels"].tolist()):
        begin, end = made["offsets"][row : row + 2].tolist()
        table.add_row(Text(text(made["tokens"][begin:end].numpy())), str(label))
    Console().print(table)


if __name__ == "__main__":
    auto_cli(main)
