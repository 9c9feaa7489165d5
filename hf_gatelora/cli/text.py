"""Text for people."""


def table(lines: list[list[str]], indent: str = "") -> str:
    """Cells in columns, of which the first is aligned to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        (indent + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])).rstrip()
        for line in lines
    )
