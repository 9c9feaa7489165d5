"""The `gatelora` command."""

import argparse
import json
import sys
from pathlib import Path

from .export import SUMMARY_FILE


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gatelora", description="Look at adapters that were trained with gated LoRA.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="show the gates of an adapter or checkpoint folder")
    inspect.add_argument("folder", type=Path, help=f"folder that holds {SUMMARY_FILE}")
    inspect.add_argument("--map", type=Path, metavar="PNG", help="also draw the gate map to this file")
    inspect.add_argument("--json", action="store_true", help="print the summary as JSON")
    arguments = parser.parse_args(argv)
    try:
        summary = json.loads((arguments.folder / SUMMARY_FILE).read_text())
    except (OSError, ValueError) as error:
        print(f"gatelora: no readable {SUMMARY_FILE} in {arguments.folder} ({error})", file=sys.stderr)
        inner = sorted(file.parent.name for file in arguments.folder.glob(f"*/{SUMMARY_FILE}"))
        if inner:
            print(f"gatelora: there is one in {', '.join(inner)}", file=sys.stderr)
        return 2
    print(json.dumps(summary, indent=1) if arguments.json else describe(summary))
    if arguments.map is not None:
        from .hub.plots import gate_map

        gate_map(summary, arguments.map)
    return 0


def describe(summary: dict) -> str:
    """The gates of a run as text: counts per tower, then the open blocks with their scores."""
    total, frozen = summary["total_steps"], summary["phase"] == "consolidate"
    lines = [
        f"{summary['open']} of {summary['gates']} blocks open ({summary['active_fraction']:.1%}), phase "
        f"{summary['phase']}, step {summary['steps']}{f' of {total}' if total else ''}",
        f"{summary['open_parameters']:,} of {summary['lora_parameters']:,} LoRA parameters",
    ]
    lines += [f"  {tower}: {row['open']} of {row['gates']}" for tower, row in summary["towers"].items()]
    lines.append("Open blocks, with their scores at the freeze:" if frozen else "Open blocks, with their scores now:")
    lines += [f"  {row['score']:+.3f}  {row['name']}" for row in summary["blocks"] if row["open"]]
    if not frozen:
        lines.append("WARNING: the gates are not frozen yet; the adapter holds all blocks.")
    if summary["degenerate"]:
        lines.append(f"WARNING: {summary['degenerate']}")
    return "\n".join(lines)
