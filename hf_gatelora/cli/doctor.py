"""`gatelora doctor`."""

from argparse import Namespace
from collections import Counter

from ..adapters.doctor import examine_environment, examine_model
from ..adapters.inspection import grids
from .text import table


def doctor(arguments: Namespace) -> tuple[dict, str, int]:
    """What gating a model would do, and what this machine can launch."""
    given = [arguments.target_modules, arguments.budget, arguments.rank]
    if arguments.model is None and given != [None] * 3:
        raise ValueError("The options need a MODEL: put it first, before --target-modules.")
    found, budget = None, 0.05 if arguments.budget is None else arguments.budget
    if arguments.model is not None:
        found = examine_model(arguments.model, arguments.target_modules, budget, arguments.rank or 16)
    environment = examine_environment()
    text = [describe_model(found, budget)] if found else []
    verdict = describe_verdict(found, environment)
    report = {"model": found, "environment": environment, "verdict": verdict}
    status = 1 if found and found["problems"] else 0
    return report, "\n\n".join([*text, describe_environment(environment), f"Verdict: {verdict}"]), status


def describe_verdict(found: dict | None, environment: dict) -> str:
    """The conclusion in a sentence or two."""
    works = [name for name, why in environment["launchers"].items() if why is None]
    launch = f"This machine can launch {', '.join(works)}."
    if found is None:
        return f"{launch} Give a MODEL to see what would be gated."
    if found["problems"]:
        count = len(found["problems"])
        return f"This cannot be trained as asked: solve the {count} problem{'s' if count > 1 else ''} above."
    if found["heads"]:
        return f"This can be trained, but heads would be gated too: see the warning above. {launch}"
    return f"This can be trained: {found['open']} of {found['gates']} blocks would stay open. {launch}"


def describe_model(found: dict, budget: float | dict[str, float]) -> str:
    """The report on a model as text."""
    lines = [f"{found['class']} {found['model']}: {found['parameters']:,} parameters"]
    if "blocks" in found:
        targets = found["target_modules"]
        targets = "lora_targets(model)" if targets == "lora_targets" else ", ".join(targets)
        lines.append(f"{found['gates']} blocks would be gated (LoRA of rank {found['r']} on {targets}):")
        columns = list(dict.fromkeys(column for counts in found["blocks"].values() for column in counts))
        rows = [
            [tower, *[str(counts.get(column, "-")) for column in columns], str(sum(counts.values()))]
            for tower, counts in found["blocks"].items()
        ]
        lines.append(table([["", *columns, "blocks"], *rows], "  "))
        inside = Counter(f"{g.tower} {column}" for g in grids(found["left_out"]["inside"]) for _, column in g.cells)
        for where, names in {
            "Left out because they are heads, projections or embeddings": found["left_out"]["outside"],
            "Left out inside the layers": [f"{name} (x{count})" for name, count in inside.items()],
        }.items():
            if names:
                lines.append(f"{where}: {', '.join(names)}")
        if found["heads"]:
            lines.append(f"WARNING: heads or projections would be gated too: {', '.join(found['heads'])}")
    if "budget" in found:
        for part, count in found["budget"].items():
            share = budget[part] if isinstance(budget, dict) else budget
            which = f" on {part!r}" if isinstance(budget, dict) else ""
            lines.append(f"A budget of {share:g}{which} keeps {count['open']} of {count['gates']} blocks open.")
        lines.append(
            f"Trainable: {found['lora_parameters']:,} LoRA parameters, about {found['open_parameters']:,} after the "
            f"freeze. The smallest budget that opens a block is {found['smallest_budget']:g}."
        )
    return "\n".join([*lines, *[f"PROBLEM: {problem}" for problem in found["problems"]]])


def describe_environment(found: dict) -> str:
    """The report on the machine as text."""
    versions = [f"{name} {version}" for name, version in found["versions"].items() if version]
    missing = [name for name, version in found["versions"].items() if not version]
    lines = ["Installed: " + ", ".join(versions) + (f". Not installed: {', '.join(missing)}" if missing else "")]
    bf16 = f", {'with' if found['bf16'] else 'without'} bf16" if found["devices"] else ""
    lines.append(f"Accelerators: {found['devices'] or 'none'}{bf16}. What `accelerate env` reports:")
    lines += [f"  {name}: {value}".replace("`", "") for name, value in found["machine"].items()]
    config = found["accelerate_config"]
    if config is None:
        lines.append("No config file of accelerate: launch with --config_file accelerate_configs/NAME.yaml")
    else:
        shown = ("distributed_type", "num_processes", "use_cpu", "mixed_precision")
        said = ", ".join(f"{key} {config[key]}" for key in shown if key in config)
        lines.append(f"Config file of accelerate: {config['file']} ({said})")
    if found["mpi"] is None:
        mine = config is not None and config["distributed_type"] == "MULTI_CPU"
        lines.append(
            f"{'WARNING: n' if mine else 'N'}o MPI: distributed_type MULTI_CPU would silently start a single process; "
            "multi_cpu.yaml works without MPI"
        )
    lines.append("Which of accelerate_configs/ work here:")
    rows = [[name, "yes" if why is None else f"no: {why}"] for name, why in found["launchers"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*lines, *[f"  {name.ljust(width)}  {text}" for name, text in rows]])
