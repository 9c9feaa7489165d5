"""The recipes by name, for the scripts that work with any of them."""

from train_clip import Clip, ClipArguments
from train_dinov2 import Classifier, ClassifierArguments

TASKS = {"clip": (Clip, ClipArguments), "dinov2": (Classifier, ClassifierArguments)}


def named_task(argv: list[str]) -> tuple[type, type]:
    """Task and arguments of the recipe that a command line names first.

    Raises:
        ValueError: where it names none.
    """
    if not argv or argv[0] not in TASKS:
        found = repr(argv[0]) if argv else "nothing"
        raise ValueError(f"Give the recipe first, one of {', '.join(TASKS)}; found {found}.")
    return TASKS[argv[0]]
