"""Measuring an adapter beside its base, on sets that are named by their sources, at any scale."""

import copy
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, PreTrainedModel

from ..adapters.bases import load_adapted, load_base, load_processor, load_reporting
from ..adapters.export import check_scalable, scaled
from ..adapters.files import read_rows
from ..adapters.inspection import Adapter, inspect_adapter
from ..gates.lora_layers import PLAIN_INITS
from ..records import Results, read_earlier
from .backbone import head_names, split_classifier
from .images import LabelledImages, eval_sets
from .labels import read_class_names
from .published import classifier_suite, plain_name
from .results import update_results, way_of
from .suite import ClipSuite, Suite, rows_of_base

logger = logging.getLogger(__name__)


def measure_base(suite: Suite, model: nn.Module, base: Callable[[], nn.Module]) -> list[dict]:
    """Rows of the untouched base: the adapted model with its adapter disabled, if that is the same.

    Args:
        model: the tuned model.
        base: makes the base; called if `model` has no adapter, or one that changed the base weights.
    """
    if isinstance(model, PeftModel) and model.peft_config["default"].init_lora_weights in PLAIN_INITS:
        with model.disable_adapter():
            return suite.measure(model, "base")
    return suite.measure(base(), "base")


def measure_tuned(suite: Suite, model: nn.Module, title: str, scales: Sequence[float] = ()) -> list[dict]:
    """Rows of a tuned model, and of its adapter at other scales (WiSE-FT), which have a field `wise`."""
    rows = suite.measure(model, title)
    for scale in scales:
        with scaled(model, scale):
            rows += [{**row, "wise": scale} for row in suite.measure(model, f"{title} x {scale:g}")]
    return rows


def evaluate_adapter(
    adapter: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    id: str | None = None,
    ood: dict[str, str] | None = None,
    retention: dict[str, str] | None = None,
    bank: dict[str, str] | None = None,
    templates: list[str] | None = None,
    retrieval: bool | None = None,
    head_label_map: dict[str, str] | None = None,
    scales: Sequence[float] = (),
    label_column: str = "label",
    class_names: str | os.PathLike | None = None,
    caption_column: str = "caption",
    k: int | None = None,
    temperature: float | None = None,
    batch_size: int = 64,
    device: str | None = None,
    output: str | os.PathLike | None = None,
) -> list[dict]:
    """Measure an adapter and its base on ID, OOD and retention sets.

    A `CLIPModel` is measured zero-shot or by retrieval (`ClipSuite`); an image classifier or vision backbone by its
    head, by the head that the base was published with, and by k-NN (`ClassifierSuite`). Sources are as for
    `load_images`. If the adapter brought its classification head, the base is measured by a head on ID and OOD sets
    only if `model` is given, as a copy of the base with the head that the training started from.

    `templates`, `retrieval`, `k` and `temperature` are by default those of the results beside the adapter, if there are
    any, else the values named here.

    Args:
        adapter: folder or Hub id of a LoRA adapter, of this package or not.
        model: folder or Hub id of its base; default: the one that the adapter names.
        id: source of the ID set, which rows call `test`.
        ood, retention: sources by the names of the sets. OOD sets have the classes of the ID set or some of these.
        bank: by the name of a set, a source of labelled images whose neighbours vote on it (k-NN).
        templates: prompts with {} for the class name; "a photo of a {}".
        retrieval: whether ID and OOD sets that have captions are measured by retrieval even if they have labels; False.
        head_label_map: by the name of a retention set, a JSON file {class: output of the published head}.
        scales: of the adapter, to measure besides 1 (WiSE-FT).
        label_column, caption_column: names of these columns.
        class_names: file with the classes of the ID and OOD sets (see `read_class_names`), which names labels that are
            whole numbers. Default: the classes of the first of these sets.
        k, temperature: of k-NN; 20 and 0.07.
        batch_size: images per forward pass.
        device: default: a GPU if there is one.
        output: results file, to which the rows are added by `update_results`; None writes nothing.

    Returns:
        The new rows: role, data, split, metric, value, n, and what every row of a results file has. `method` is `base`
        or, for the adapter, the method of the results beside it, else `gated` or `lora`. Unless `output` lies in the
        adapter's folder, `adapter` tells it apart from others.

    Raises:
        ValueError: if adapter, base and sets do not match, or there is nothing to measure.
    """
    arguments = {key: value for key, value in locals().items() if value and key not in ("adapter", "output")}
    arguments = {key: str(v) if isinstance(v, os.PathLike) else v for key, v in arguments.items()}
    if not (id or ood or retention):
        raise ValueError("There is nothing to measure: give an ID, OOD or retention set.")
    if any(not 0 <= scale <= 1 for scale in scales):
        raise ValueError(f"scales {list(scales)} are out of range: they lie between 0 (the base) and 1 (the adapter).")
    named = read_class_names(class_names) if class_names else None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if output is not None:
        read_earlier(output)
        read_rows(output)
    found = inspect_adapter(adapter)
    if scales:
        check_scalable(found.config, str(found.folder))
    name = str(model or found.config.get("base_model_name_or_path"))
    base, new_head = load_base(found, model)
    is_clip = isinstance(base, CLIPModel)
    if not is_clip and base.main_input_name != "pixel_values":
        raise ValueError(f"{type(base).__name__} cannot be measured: only CLIPModel and vision backbones can.")
    if is_clip and (bank or head_label_map):
        raise ValueError("bank and head_label_map are for vision backbones: a CLIPModel is measured without them.")
    if not is_clip and (templates or retrieval):
        raise ValueError(f"Prompts, templates and retrieval are for CLIPModel: {type(base).__name__} reads no texts.")
    beside = read_rows(found.folder)
    stated = [*(row.get("arguments") or {} for row in beside), (found.summary or {}).get("arguments") or {}]
    run = next((way for arguments in stated if (way := way_of(arguments))), {})
    if is_clip:
        templates = list(templates or run.get("templates") or ["a photo of a {}"])
        retrieval = run.get("retrieval", False) if retrieval is None else retrieval
        arguments["retrieval"] = retrieval
    else:
        k, temperature = k or run.get("k", 20), temperature or run.get("temperature", 0.07)
    published = None if is_clip else _published_head(base, new_head, *found.base(model))
    # The published head is not the one that another head's training started from.
    headless = not is_clip and (new_head or model is None) and _brought_head(found, base)
    if scales and headless:
        raise ValueError(
            f"{found.folder} cannot be scaled: it brought its head, and the head that this started from is not known. "
            "Give a copy of the base that has it as model."
        )
    tuned = load_adapted(base, found).to(device)
    processor = load_processor(AutoImageProcessor, found, model)
    if processor is None:
        raise ValueError(f"Neither {found.folder} nor {name} has an image processor that transformers can load.")

    def load(source: str, classes: list[str] | None = None, label_names: list[str] | None = None) -> LabelledImages:
        return LabelledImages(
            source,
            lambda image: processor(image, return_tensors="pt")["pixel_values"][0],
            label_column,
            caption_column,
            classes,
            label_names,
        )

    load_target = partial(load, label_names=named)
    id_sets = {"test": id} if id else {}
    classes = None
    if id_sets or ood:
        classes = named or load_target(next(iter({**id_sets, **(ood or {})}.values()))).class_names
        if classes is not None and not is_clip:
            classes = _head_order(found, base, new_head, classes)
    sets = eval_sets("id", id_sets, load_target, classes, bank, bool(retrieval))
    sets += eval_sets("ood", ood or {}, load_target, classes, bank, bool(retrieval))
    sets += eval_sets("retention", retention or {}, load, None, bank)
    names = [data.name for data in sets]
    if unknown := sorted(set(head_label_map or {}) - set(retention or {})):
        known = ", ".join(retention or {}) or "none"
        raise ValueError(f"The head label map {unknown[0]!r} belongs to no retention set: the sets are {known}.")
    if unknown := sorted(set(bank or {}) - set(names)):
        raise ValueError(f"The bank {unknown[0]!r} belongs to no set: there are {', '.join(names)}.")
    if is_clip:
        suite: Suite = ClipSuite(
            sets=sets, batch_size=batch_size, tokenize=_tokenizer(found, model), templates=templates
        )
    else:
        knn = {"k": k, "temperature": temperature}
        suite = classifier_suite(sets, *published, head_label_map, batch_size=batch_size, **knn)

    method, seed = _identity(found, beside)
    base_rows = measure_base(suite, tuned, lambda: load_base(found, model)[0].to(device))
    if headless:
        logger.warning(
            "The adapter brought its head: the base is not measured by a head on ID and OOD sets. To measure it, give "
            "a copy of the base with the head that the training started from as model."
        )
    rows = [{"method": "base", **row} for row in rows_of_base(base_rows, not headless)]
    rows += [{"method": method, **row} for row in measure_tuned(suite, tuned, method, scales)]
    own = output is not None and Path(output).parent.resolve() == found.folder.resolve()
    which = {} if own else {"adapter": str(adapter)}
    results = Results(None, **which, model=name, seed=seed, arguments={**arguments, **suite.way})
    results.extend(rows)
    if output is not None:
        update_results(results.rows, output)
    return results.rows


def _head_order(found: Adapter, base: PreTrainedModel, new_head: bool, own: list[str]) -> list[str]:
    """Names of the classes in the order of the head's outputs, spelled as in the set.

    Args:
        own: the classes of the set that the adapter is measured on, whose order is taken if the head has no names.

    Raises:
        ValueError: if they are not the head's.
    """
    if split_classifier(base)[2] is None:
        return own
    count = base.config.num_labels
    stated = ((found.summary or {}).get("base_model") or {}).get("classes") or []
    named = head_names(dict(enumerate(stated))) or (None if new_head else head_names(base.config.id2label))
    if named is not None and set(own) <= set(named):
        return named
    spelled = {plain_name(name): name for name in own}
    if named is not None and len(spelled) == len(own) and spelled.keys() <= set(map(plain_name, named)):
        return [spelled.get(plain_name(name), name) for name in named]
    if named is not None or len(own) != count:
        known = f" ({', '.join(named[:3])}, ...)" if named else ""
        raise ValueError(
            f"The head of {found.folder} tells {count} classes apart{known}, the set has {len(own)} "
            f"({', '.join(own[:3])}, ...): give a set of the classes that it was trained on. If the head has these, "
            "give a copy of the base whose config.json names them in its order (id2label) as model."
        )
    logger.warning("The head's classes have no known names: they are taken to be those of the set, in its order.")
    return own


def _brought_head(found: Adapter, base: PreTrainedModel) -> bool:
    name = split_classifier(base)[1]
    return name is not None and any(key.startswith(f"{name}.") for key in found.heads)


def _published_head(
    base: PreTrainedModel, new_head: bool, name: str, source: dict
) -> tuple[nn.Module | None, dict[int, str]]:
    """The head that the base was published with, on the CPU (None if it had none), and the names of its classes."""
    if new_head:
        published, random = load_reporting(type(base), name, **source)
        return (None, {}) if random else (split_classifier(published)[2], published.config.id2label)
    return copy.deepcopy(split_classifier(base)[2]), base.config.id2label


def _tokenizer(found: Adapter, model: str | os.PathLike | None) -> Callable[[list[str]], dict[str, torch.Tensor]]:
    tokenizer = load_processor(AutoTokenizer, found, model)
    if tokenizer is None:
        raise ValueError(f"Neither {found.folder} nor its base has a tokenizer that transformers can load.")

    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    return tokenize


def _identity(found: Adapter, rows: list[dict]) -> tuple[str, int | None]:
    """Method and seed of the run that made the adapter, as far as the rows beside it tell."""
    seeds = {row["method"]: row.get("seed") for row in rows if row["method"] != "base"}
    if len(seeds) > 1:
        seeds = {method: seed for method, seed in seeds.items() if method == found.folder.name}
    return next(iter(seeds.items()), ("lora" if found.summary is None else "gated", None))
