"""The commands that write or publish: fold, merge, wise, combine, card and push."""

from argparse import Namespace
from os import PathLike
from pathlib import Path

from ..adapters.inspection import Adapter, find_adapter, inspect_adapter
from .inspect import describe


def fold(arguments: Namespace) -> tuple[dict, str, int]:
    """Write a checkpoint as a stock adapter of its open blocks."""
    from ..adapters.export import fold_checkpoint

    fold_checkpoint(inspect_adapter(arguments.checkpoint).folder, arguments.output, force=arguments.force)
    return _written(arguments.output)


def merge(arguments: Namespace) -> tuple[dict, str, int]:
    """Write the base model with an adapter merged into it."""
    import torch

    from ..adapters.bases import merge_adapter

    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    adapter = inspect_adapter(arguments.adapter)
    model = merge_adapter(adapter, arguments.output, arguments.model, dtype, force=arguments.force)
    report = {"output": arguments.output, "class": type(model).__name__, "dtype": str(model.dtype).split(".")[1]}
    size = sum(file.stat().st_size for file in Path(arguments.output).iterdir() if file.is_file())
    report |= {"parameters": model.num_parameters(), "bytes": size}
    text = f"Merged into a {report['class']} of {report['parameters']:,} parameters in {report['dtype']}"
    return report, f"{text}: {arguments.output} ({size:,} bytes)", 0


def wise(arguments: Namespace) -> tuple[dict, str, int]:
    """Write an adapter between its base and itself."""
    from ..adapters.export import scale_adapter

    adapter = inspect_adapter(arguments.adapter)
    base = _base_of([adapter], arguments.model)
    scale_adapter(adapter.folder, arguments.scale, arguments.output, base, force=arguments.force)
    return _written(arguments.output, scale=arguments.scale)


def combine(arguments: Namespace) -> tuple[dict, str, int]:
    """Write the weighted sum of adapters as one."""
    from ..adapters.combine import combine_adapters

    sources, weights = zip(*map(_weighted, [arguments.first, *arguments.others]), strict=True)
    adapters = [inspect_adapter(source) for source in sources]
    base = _base_of(adapters, arguments.model)
    folders: list[str | PathLike] = [adapter.folder for adapter in adapters]
    combine_adapters(folders, list(weights), arguments.output, base, force=arguments.force)
    return _written(arguments.output, weights=[list(pair) for pair in zip(sources, weights, strict=True)])


def card(arguments: Namespace) -> tuple[dict, str, int]:
    """Write the card of an adapter again."""
    from ..card.write import write_card

    path = write_card(_local(arguments.adapter), _hub_id(arguments.base), license=arguments.license)
    return {"card": str(path)}, str(path), 0


def push(arguments: Namespace) -> tuple[dict, str | None, int]:
    """Put an adapter on the Hub."""
    from ..card.push import PushError, push_adapter

    try:
        url = push_adapter(
            _local(arguments.adapter),
            arguments.repo,
            base=_hub_id(arguments.base),
            license=arguments.license,
            private=arguments.private,
            revision=arguments.revision,
            commit_message=arguments.message,
            create_pr=arguments.create_pr,
        )
    except PushError as error:
        return {"error": str(error)}, None, 1
    return {"url": url}, url, 0


def _local(source: str) -> Path:
    if not Path(source).is_dir():
        raise ValueError(f"{source} is not a local folder: give the folder of an adapter.")
    return find_adapter(source)


def _hub_id(base: str | None) -> str | None:
    from ..card.contents import hub_id

    if base is not None and hub_id(base) is None:
        raise ValueError(f"--base {base} is not the Hub id of a model, such as facebook/dinov2-small.")
    return base


def _weighted(text: str) -> tuple[str, float]:
    source, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        return source, float(weight)
    except ValueError as error:
        raise ValueError(f"{text}: {weight!r} is not a number. Write ADAPTER=WEIGHT, such as {source}=0.5.") from error


def _base_of(adapters: list[Adapter], model: str | None):
    """The base that --model names, for the heads of adapters; None if it is not given or no adapter has a head."""
    adapter = next((adapter for adapter in adapters if adapter.heads), None)
    if adapter is None or model is None:
        return None
    from ..adapters.bases import load_base

    base, new_head = load_base(adapter, model)
    if new_head:
        raise ValueError(f"--model {model} does not have the head of {adapter.folder} ({', '.join(adapter.heads)}).")
    return base


def _written(output: str, **more) -> tuple[dict, str, int]:
    from ..card.write import refresh_card

    refresh_card(output)
    adapter = inspect_adapter(output)
    return {**adapter.report(), **more}, f"{describe(adapter)}\nWritten to {output}", 0
