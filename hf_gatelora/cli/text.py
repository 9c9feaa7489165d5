"""Text for people."""

from textwrap import indent as indented

from tabulate import tabulate


def table(lines: list[list[str]], indent: str = "") -> str:
    """Cells in columns, of which the first is aligned to the left and the others to the right."""
    align = ["left"] + ["right"] * (len(lines[0]) - 1)
    return indented(tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=align), indent)
