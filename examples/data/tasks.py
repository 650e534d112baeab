"""Which data module is for which task."""

from pathlib import Path

import yaml

from data.arena import ListOps, Pathfinder
from data.audio import SpokenWords
from data.base import SequenceData
from data.forecast import Forecasting
from data.images import SequentialImages
from data.language import Characters, Words
from data.memory import Copying, Delay
from data.retrieval import PaperPairs
from data.storage import DataError, first_line
from data.text import Reviews

TASKS: dict[str, type[SequenceData]] = {
    "audio": SpokenWords,
    "copying": Copying,
    "delay": Delay,
    "forecast": Forecasting,
    "images": SequentialImages,
    "listops": ListOps,
    "pathfinder": Pathfinder,
    "retrieval": PaperPairs,
    "shakespeare": Characters,
    "text": Reviews,
    "wikitext103": Words,
}


def task_of(recipe: Path) -> str:
    """The kind of data that a recipe is for."""
    try:
        task = yaml.safe_load(recipe.read_text()).get("task")
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise DataError(f"{recipe} is not a recipe in YAML: {first_line(error)}") from error
    if not isinstance(task, str) or task not in TASKS:
        raise DataError(f"{recipe}: expected task to be one of {', '.join(TASKS)}, got {task!r}")
    return task
