"""Writing the model card of an adapter folder, and telling a card of ours from one that somebody wrote."""

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import HTTPError
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..records import CARD, EVAL_RESULTS, FRONTIER, GATE_MAP, write_text
from .contents import AdapterCard, hub_id
from .plots import frontier, gate_map
from .tables import scales_table

logger = logging.getLogger(__name__)

MARK = re.compile(r"\n<!-- written by hf_gatelora \(([0-9a-f]{16})\);[^>]*-->\s*\Z")
MARK_TEXT = "\n<!-- written by hf_gatelora ({}); once you edit this card it is kept as you left it -->\n"
# What an unedited card of transformers says: after a push of a model, and by Trainer.
TRANSFORMERS_CARD = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
TRAINERS_CARD = "<!-- This model card has been generated automatically according to the information the Trainer"


def write_card(
    directory: str | os.PathLike,
    base: str | None = None,
    *,
    license: str | None = None,
    language: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
) -> Path:
    """Write the `README.md`, pictures and `.eval_results/` of an adapter folder from the files in it.

    A card that was written or edited by hand is kept; the pictures beside it are drawn again. Base model, license,
    language, data sets and tags of an earlier card are kept if they are not given.

    Args:
        directory: folder of a LoRA adapter; its `gates.json` and `results.jsonl` are optional.
        base: Hub id of the base model, if the adapter was trained on a local copy of it; a folder is ignored.
        license: of the adapter; default: that of the base model, if it can be looked up.
        language, datasets, tags: more metadata; one or a list.
        repo_id, revision: where the adapter is or will be on the Hub, for the code that loads it.

    Returns:
        The path of the card.

    Raises:
        ValueError: if the folder holds no adapter, or a file in it cannot be read.
    """
    directory = Path(directory)
    if (directory / EVAL_RESULTS).parent.is_symlink():
        raise ValueError(f"{(directory / EVAL_RESULTS).parent} is a link: replace it with a folder, or remove it.")
    given: dict[str, Any] = {"base": hub_id(base), "license": license, "language": language}
    given |= {"repo_id": repo_id, "revision": revision}
    given |= {"datasets": [datasets] if isinstance(datasets, str) else datasets}
    given |= {"tags": [tags] if isinstance(tags, str) else tags}
    before = _read_text(directory / CARD)
    if before and MARK.search(before) and is_generated(before):
        said = ModelCard(before, ignore_metadata_errors=True).data
        known = {key: said.get(key) for key in ("license", "language", "datasets")}
        known["base"] = said.get("base_model")
        known["tags"] = [tag for tag in said.get("tags") or [] if not tag.startswith("base_model:")]
        if AdapterCard.read(directory).base in (None, known["base"]):  # else it was trained again, on another base
            given = known | {key: value for key, value in given.items() if value is not None}
    card = AdapterCard.read(directory, **given)
    if card.summary.get("blocks"):
        gate_map(card.summary, directory / GATE_MAP)
        card.pictures.add(GATE_MAP)
    if scales_table(card.rows):
        frontier(card.rows, directory / FRONTIER)
        card.pictures.add(FRONTIER)
    if card.eval_entries:
        (directory / EVAL_RESULTS).parent.mkdir(exist_ok=True)
        write_text(yaml.safe_dump(eval_result_entries_to_yaml(card.eval_entries)), directory / EVAL_RESULTS)
    else:
        (directory / EVAL_RESULTS).unlink(missing_ok=True)
    if card.license is None:
        card.license = _license_of(card.base or card.config.get("base_model_name_or_path"))
    _write_unless_edited(directory / CARD, card, before)
    return directory / CARD


def refresh_card(directory: str | os.PathLike) -> None:
    """Write the card of a folder that an adapter was saved to, without the network and without drawing.

    Errors are only logged: no checkpoint is lost because of its card.
    """
    directory = Path(directory)
    try:
        _write_unless_edited(directory / CARD, AdapterCard.read(directory), _read_text(directory / CARD))
    except Exception as error:
        logger.warning(f"The adapter is saved, but without a new model card: {error}")


def is_generated(text: str) -> bool:
    """Whether nobody has edited a card of ours, or a placeholder of PEFT, transformers or the Hub."""
    mark = MARK.search(text)
    if mark:
        return _digest(text[: mark.start()]) == mark.group(1)
    body = REGEX_YAML_BLOCK.sub("", text).strip()
    if not body or body.startswith(TRAINERS_CARD):
        return True
    body = re.sub(r"\n### Framework versions\s+- PEFT \S+\s*\Z", "", body)
    placeholders: tuple[dict[str, str], ...] = ({}, {"model_description": TRANSFORMERS_CARD})
    return body.strip() in {ModelCard.from_template(ModelCardData(), **known).text.strip() for known in placeholders}


def _license_of(base: str | None) -> str | None:
    if base is None:
        return None
    try:
        if hub_id(base) is None:
            text = _read_text(Path(base) / CARD)
            return ModelCard(text, ignore_metadata_errors=True).data.get("license") if text else None
        data = HfApi().model_info(base, timeout=10).card_data
    except (OSError, ValueError, HTTPError, yaml.YAMLError):
        return None  # it cannot be looked up now: the card says that it is not stated
    return data.license if data else None


def _write_unless_edited(path: Path, card: AdapterCard, before: str | None) -> None:
    if before is None or is_generated(before):
        text = card.render()
        write_text(text + MARK_TEXT.format(_digest(text)), path)
    else:
        logger.warning(f"{path} was written or edited by hand and stays as it is. Remove it to get a new card.")


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
