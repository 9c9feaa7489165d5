"""Adding measurements to a results file, beside those that a run or an earlier evaluation left there."""

import logging
import os

from ..records import read_earlier, write_results
from .templates import NAMED, prompt_templates

logger = logging.getLogger(__name__)


def way_of(arguments: dict) -> dict:
    """How something was measured, from the arguments in its rows, a recipe's or an evaluation's.

    Returns:
        Those of `templates` (a list), `k`, `temperature` and `retrieval` that the arguments state.
    """
    templates = arguments.get("templates") or arguments.get("prompt")
    if isinstance(templates, str):
        templates = prompt_templates(templates) if templates in NAMED else [templates]
    mode = arguments.get("mode")
    found = {
        "templates": [str(template) for template in templates] if isinstance(templates, list) else None,
        "k": arguments.get("k", arguments.get("knn_k")),
        "temperature": arguments.get("temperature", arguments.get("knn_temperature")),
        "retrieval": arguments.get("retrieval", mode and mode == "contrastive"),
    }
    return {key: value for key, value in found.items() if value is not None}


def update_results(rows: list[dict], path: str | os.PathLike) -> None:
    """Add rows to a results file. Those of the same measurement (adapter, method, set, metric, scale) are replaced.

    Others stay, unless they cannot be compared with the new ones because they are of a set of the same name from
    another source or were measured in another way (`way_of`). These are dropped, and a logged warning names them.

    Raises:
        ValueError: if the file cannot be read.
    """

    def on_set(row: dict) -> tuple:
        return row.get("adapter"), row.get("role"), row.get("data")

    def measurement(row: dict) -> tuple:
        return *on_set(row), row["method"], row["metric"], row.get("wise")

    new = {measurement(row) for row in rows}
    current = {on_set(row): (row["split"], way_of(row.get("arguments") or {})) for row in rows}
    kept: list[dict] = []
    dropped: dict[tuple, list[str]] = {}
    for row in read_earlier(path):
        if measurement(row) in new:
            continue
        source, way = current.get(on_set(row), (row.get("split"), {}))
        before = way_of(row.get("arguments") or {})
        other = ["source"] * (source != row.get("split")) + [k for k in way if k in before and before[k] != way[k]]
        if other:
            dropped.setdefault((row["method"], row.get("wise", 1.0), row["data"]), other)
        else:
            kept.append(row)
    for (method, scale, data), other in dropped.items():
        logger.warning(
            f"{path}: dropped what was measured of {method} at scale {scale:g} on {data!r} with another "
            f"{' and '.join(other)}: it cannot be compared with the new rows. Measure it again to have it beside them."
        )
    write_results([*kept, *rows], path)
