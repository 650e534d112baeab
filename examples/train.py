"""Train and evaluate S4 models: python examples/train.py [COMMAND] RECIPE [--options]."""

import os

# Before torch is loaded: its threads sleep while they wait, instead of taking turns on a core that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

if TYPE_CHECKING:
    from trainer.cli import ExampleCLI

RECIPES = Path(__file__).parent / "recipes"
COMMANDS = ("fit", "validate", "test", "predict", "generate")


def names() -> list[str]:
    """The recipes there are."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def usage() -> str:
    """What there is to run."""
    width = max(map(len, names()))
    first = {name: (RECIPES / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ") for name in names()}
    recipes = "\n".join(f"  {name:{width}}  {line}" for name, line in first.items())
    return f"""Train and evaluate S4 models of sequences.

  python examples/train.py [{"|".join(COMMANDS)}] RECIPE [--options]

Recipes (or the path of a YAML file):
{recipes}

For example:
  python examples/train.py digits
  python examples/train.py scifar_small --data.path DIR --trainer.max_steps 300
  python examples/train.py scifar_small --ckpt_path last        go on with the run that was interrupted
  python examples/train.py test scifar_small --ckpt_path best   test its best weights
  python examples/train.py generate shakespeare --prompt ROMEO: samples of a model of text
  python examples/train.py digits --help                        all options
  python examples/train.py digits --print_config                the resolved configuration"""


def run(arguments: list[str], program: str = "") -> "ExampleCLI":
    """Do what a command line says and return the finished LightningCLI.

    Args:
        arguments: [COMMAND] RECIPE [--options].
        program: what a user called, if not train.py.

    Raises:
        SystemExit: code 0 after help, 2 for an unknown recipe, 1 or 2 for anything else the user can mend.
    """
    command, rest = (
        (arguments[0], arguments[1:]) if arguments[:1] and arguments[0] in COMMANDS else ("fit", arguments)
    )
    if not rest or rest[0] in ("-h", "--help"):
        Console(highlight=False, soft_wrap=True, markup=False).print(usage())
        raise SystemExit(0)
    recipe = RECIPES / f"{rest[0]}.yaml" if (RECIPES / f"{rest[0]}.yaml").is_file() else Path(rest[0])
    if not recipe.is_file():
        _unknown(rest[0], rest is arguments)
    from trainer.cli import run_recipe  # only here: Lightning takes seconds to load

    return run_recipe(command, recipe, rest[1:], program or f"train.py {command} {rest[0]}")


def _unknown(word: str, first: bool) -> NoReturn:
    commands = COMMANDS if first else ()
    meant = "".join(
        f"did you mean {near}? " for near in difflib.get_close_matches(word, [*names(), *commands], 1)
    )
    expected = ", ".join([*commands, *names()])
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(
        f"unknown {'command or ' * first}recipe {word!r}: {meant}"
        f"expected one of {expected}, or the path of a YAML file"
    )
    raise SystemExit(2)


if __name__ == "__main__":
    run(sys.argv[1:])
