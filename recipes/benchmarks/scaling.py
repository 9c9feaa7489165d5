"""How time and memory of a step grow with batch, rank, blocks and model, for LoRA and for gated LoRA.

    python recipes/benchmarks/scaling.py --batch_size 4 --vary batch_size=1,16 lora_r=4,64 layers=6,24 model=clip-b16

Measures the point that the arguments of `benchmark.py` describe, then others that differ from it in one argument each.
Can be stopped and started again: points that the results file holds are not measured anew. Writes results.jsonl,
scaling.md and scaling.png.
"""

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmark import MEBIBYTE, cell, measured_rows, stated
from benchmark_cases import BenchmarkArguments
from benchmark_plots import growth
from tqdm import tqdm
from transformers import HfArgumentParser

from hf_gatelora.card.tables import markdown
from hf_gatelora.records import read_earlier, write_results, write_text

VARIED = {"model": str, "layers": int, "image_size": int, "batch_size": int, "lora_r": int}


def point_of(stated: dict) -> str:
    """What tells one point from another: the arguments but for how often it was measured."""
    return json.dumps({key: value for key, value in stated.items() if key != "repeats"})


@dataclass
class ScalingArguments(BenchmarkArguments):
    """The arguments of `benchmark.py`, and which of them take other values."""

    vary: list[str] = field(
        default_factory=lambda: ["batch_size=1,2,16", "lora_r=4,64", "layers=3,6,24"],
        metadata={"help": f"NAME=VALUE,VALUE: other values of {', '.join(VARIED)}"},
    )
    only: list[str] = field(
        default_factory=lambda: ["frozen forward", "search", "frozen@0.05 random", "frozen@0.05 late"],
        metadata={"help": "the cases, beside lora"},
    )
    output_dir: str = field(default="outputs/scaling", metadata={"help": "where the results go"})

    def points(self) -> list[BenchmarkArguments]:
        """The point itself, and those beside it.

        Raises:
            ValueError: where `vary` is not of the form NAME=VALUE,VALUE.
        """
        own = {key: value for key, value in asdict(self).items() if key != "vary"}
        found = [BenchmarkArguments(**own)]
        for entry in self.vary:
            name, _, values = entry.partition("=")
            try:
                found += [replace(found[0], **{name: VARIED[name](value)}) for value in values.split(",")]
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"--vary {entry}: give NAME=VALUE,VALUE with numbers for {', '.join(VARIED)} ({error})."
                ) from error
        return found


def by_point(rows: list[dict]) -> list[tuple[dict, dict[tuple[str, str], dict]]]:
    """The points of a results file: what each has other than the first, and its rows by method and metric."""
    found: dict[str, dict] = {}
    for row in rows:
        found.setdefault(point_of(row["arguments"]), {})[row["method"], row["metric"]] = row
    points = [(json.loads(point), metrics) for point, metrics in found.items()]
    own, _ = points[0]
    return [({key: value for key, value in point.items() if value != own[key]}, metrics) for point, metrics in points]


def table(rows: list[dict]) -> str:
    """One line per point as a Markdown table."""
    points = by_point(rows)
    first = points[0][1]
    others = [method for method, metric in first if metric == "step_ratio" and method != "lora"]
    own = rows[0]["arguments"]

    def median(metrics: dict, method: str, metric: str, scale: float = 1.0, digits: int = 2) -> str:
        row = metrics.get((method, metric))
        return cell(row and {"value": row["value"]}, scale, digits)

    lines = [["point", "blocks", "lora: ms", *[f"{method}: step" for method in others]]]
    lines[0] += ["lora: MiB", *[f"{method}: memory" for method in others], "gates %"]
    for differing, metrics in points:
        named = ", ".join(f"{key} {value}" for key, value in differing.items())
        line = [named or f"{own['model']}, batch_size {own['batch_size']}, lora_r {own['lora_r']}"]
        line += [median(metrics, "search", "blocks", digits=0), median(metrics, "lora", "step_seconds", 1e3, 0)]
        line += [median(metrics, method, "step_ratio") for method in others]
        line += [median(metrics, "lora", "step_bytes", 1 / MEBIBYTE, 0)]
        line += [median(metrics, method, "step_bytes_ratio") for method in others]
        lines.append([*line, median(metrics, "search", "machinery_ratio", 100)])
    return markdown(lines)


def main(argv: list[str]) -> None:
    (arguments,) = HfArgumentParser(ScalingArguments).parse_args_into_dataclasses(argv)
    output = Path(arguments.output_dir)
    rows = read_earlier(output / "results.jsonl")
    measured = {point_of(row["arguments"]) for row in rows}
    for point in [] if arguments.report else tqdm(arguments.points(), desc="points"):
        if point_of(stated(point)) not in measured:
            # In a process of its own, because the peak memory of this one would be that of the ones measured in it.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                rows += process.submit(measured_rows, point).result()
            write_results(rows, output / "results.jsonl")
    text = table(rows)
    write_text(text + "\n", output / "scaling.md")
    growth(by_point(rows), rows[0]["arguments"], output / "scaling.png")
    print(f"\n{text}\n\nMedians; step and memory as ratios to LoRA's. All files: {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
