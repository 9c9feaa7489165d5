"""What the card of an adapter says, read from the files of its folder. No number comes from anywhere else."""

import math
import os
import re
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..adapters.files import module_names, read_config, read_rows, read_shapes, read_summary
from ..config import GateConfig
from ..evaluation.results import way_of
from ..records import (
    FRONTIER,
    GATE_MAP,
    KNN_TOP1,
    TITLES,
    TOP1,
    TRAINED,
    metric_of,
    primary_rows,
    without_paths,
)
from . import tables
from .tables import measured

HUB_ACCURACIES = (TOP1.name, KNN_TOP1.name)  # of the Hub's metric "accuracy"
TEMPLATE = Path(__file__).with_name("template.md")
# Settings that come first, under the name of any of these that is known.
FIRST = (
    *("gate_target_active", "gate_lambda", "r", "lora_alpha", "learning_rate", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
)
# Arguments that other parts of the card show, that follow from others, or that say how a run was started or watched.
NOT_SHOWN = {
    *("model", "train", "test", "validation", "id", "ood", "retention", "bank", "head_label_map", "imagenet"),
    *("lora_r", "label_column", "caption_column", "label_names", "class_names", "full_learning_rate", "methods"),
    *("wise", "scales", "batch_size", "device", "output_dir", "run_name", "report_to", "disable_tqdm", "use_cpu"),
    *("keep_finished", "resume_from_checkpoint", "accelerator_config", "remove_unused_columns", "local_rank"),
    *("include_for_metrics", "load_best_model_at_end", "greater_is_better", "do_train", "do_eval", "do_predict"),
}
PREFIXES = (
    *("hub_", "push_to_hub", "logging_", "log_", "save_", "eval_", "per_device_eval_", "dataloader_", "ddp_"),
    *("validation_", "fsdp", "deepspeed", "tpu_", "trackio_"),
)


@dataclass
class AdapterCard:
    """What the card of an adapter says.

    Args:
        name: title of the card, and of the model in `model-index`; default: the repository's or the base model's name.
        config: contents of `adapter_config.json`.
        tensors: number of values by name of the weights in the adapter's file, and `file_bytes` of that file.
        summary: contents of `gates.json`; empty for an adapter without gates.
        rows: of `results.jsonl`; may be empty.
        pictures: which of `gate_map.png` and `frontier.png` lie in the folder.
        has_processor: whether the adapter's folder also holds the preprocessing.
        base: Hub id of the base model; None if it is a local one.
        repo_id, revision: where the adapter is on the Hub; None if that is not known.
        license, language, datasets, tags: metadata; None leaves it out.
    """

    name: str
    config: dict
    tensors: dict[str, int]
    file_bytes: int
    summary: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    pictures: set[str] = field(default_factory=set)
    has_processor: bool = False
    base: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    datasets: list[str] | None = None
    tags: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, directory: str | os.PathLike, **given) -> "AdapterCard":
        """The card of a folder; `given` fields that are not None override what the files say.

        Raises:
            ValueError: if the folder holds no adapter, or a file in it cannot be read.
        """
        directory = Path(directory)
        try:
            config = read_config(directory)
            shapes, file_bytes = read_shapes(directory)
        except (OSError, ValueError) as error:
            raise ValueError(f"{directory} holds no readable adapter ({error}). Save one there first.") from error
        try:
            summary = read_summary(directory) or {}
            rows = _rows_of_adapter(read_rows(directory), directory)
            if summary.get("phase") == "consolidate":  # measured with all blocks: that is not this adapter
                rows = [row for row in rows if row.get("frozen", True)]
        except ValueError as error:
            raise ValueError(f"The model card of {directory} cannot be written: {error}") from error
        trained_on = [row["dataset"] for row in rows if "dataset" in row and (row["role"], row["data"]) == TRAINED]
        found: dict[str, Any] = {
            "name": _title(config, rows, bool(summary)) or directory.absolute().name,
            "base": hub_id(config.get("base_model_name_or_path")),
            "datasets": list(dict.fromkeys(trained_on)) or None,
        }
        found |= {key: value for key, value in given.items() if value is not None}
        if found.get("repo_id"):
            found["name"] = found["repo_id"].rsplit("/", 1)[-1]
        return cls(
            config=config,
            tensors={key: math.prod(shape) for key, shape in shapes.items()},
            file_bytes=file_bytes,
            summary=summary,
            rows=rows,
            pictures={name for name in (GATE_MAP, FRONTIER) if (directory / name).is_file()},
            has_processor=any((directory / f"{kind}_config.json").is_file() for kind in ("preprocessor", "processor")),
            **found,
        )

    # ---- the model ----------------------------------------------------------------------------------------------

    @property
    def model_class(self) -> str | None:
        """Class of the base model, if it is one of transformers."""
        known = self.summary.get("base_model")
        if known is None:
            auto = self.config.get("auto_mapping") or {}
            known = {"class": auto.get("base_model_class"), "library": auto.get("parent_library")}
        name, library = str(known.get("class")), str(known.get("library"))
        return name if library.split(".")[0] == "transformers" and name.isidentifier() else None

    @property
    def classes(self) -> list[str]:
        """Names of the classes that it was trained on, as far as they are known."""
        stated = [(self.summary.get("base_model") or {}).get("classes")]
        stated += [row.get("classes") for row in self.rows if (row["role"], row["data"]) == TRAINED]
        return next((list(map(str, names)) for names in stated if names), [])

    @cached_property
    def pipeline_tag(self) -> str | None:
        """Task of the model on the Hub, by its class."""
        from transformers.models.auto import modeling_auto as auto

        tasks: dict[str, Any] = {
            "zero-shot-image-classification": auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            "image-classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            "text-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "text-generation": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "image-feature-extraction": auto.MODEL_FOR_IMAGE_MAPPING_NAMES,
            "feature-extraction": auto.MODEL_MAPPING_NAMES,
        }
        for task, names in tasks.items():
            known = {name for value in names.values() for name in ([value] if isinstance(value, str) else value)}
            if self.model_class in known:
                return task
        return None

    @property
    def head_parameters(self) -> int:
        """Values of trained modules beside LoRA, such as a classification head."""
        return sum(count for name, count in self.tensors.items() if "lora_" not in name)

    @property
    def lora_parameters(self) -> int:
        """Values of the LoRA blocks in the file."""
        return sum(self.tensors.values()) - self.head_parameters

    @property
    def lora_modules(self) -> int:
        """LoRA blocks in the file."""
        return len(module_names(self.tensors))

    @property
    def frozen(self) -> bool:
        return self.summary.get("phase") == "consolidate"

    @property
    def open_blocks(self) -> list[dict]:
        return [block for block in self.summary.get("blocks", []) if block["open"]]

    # ---- training -----------------------------------------------------------------------------------------------

    @property
    def stale_step(self) -> tuple[int, int] | None:
        """(step that was measured, step of the adapter's weights), if these differ."""
        steps = {row["step"] for row in measured(self.rows) if "step" in row}
        weights = self.summary.get("weights_step", self.summary.get("steps"))
        return (max(steps), weights) if steps and weights is not None and steps != {weights} else None

    @cached_property
    def arguments(self) -> dict[str, object]:
        """Settings of the run: first those that always matter, then what differs from its default."""
        stated = self.rows[0].get("arguments") or {} if self.rows else {}
        found = {**(self.summary.get("arguments") or {}), **stated}
        if self.summary:
            gates, defaults = self.summary.get("config") or {}, {f.name: f.default for f in fields(GateConfig)}
            found |= {f"gate_{key}".rstrip("_"): v for key, v in gates.items() if v != defaults.get(key)}
            found.setdefault("gate_target_active", gates.get("target_active"))
        else:
            found = {key: value for key, value in found.items() if not key.startswith("gate_")}
        found |= {key: self.config[key] for key in ("r", "lora_alpha", "lora_dropout") if key in self.config}
        shown = {
            key: without_paths(value)
            for key, value in sorted(found.items())
            if value is not False  # 0 says something
            and value not in (None, "", [], {})
            and key not in NOT_SHOWN
            and not key.startswith(PREFIXES)
            and not key.endswith("_token")
        }
        return {key: shown[key] for key in (*(k for k in FIRST if k in shown), *(k for k in shown if k not in FIRST))}

    @property
    def mixed_prompts(self) -> bool:
        """Whether sets were measured with different prompts."""
        sets = {(row["role"], row["data"]): row.get("arguments") or {} for row in measured(self.rows)}
        prompts = [way.get("templates") for way in map(way_of, sets.values())]
        return len({tuple(prompt) for prompt in prompts if prompt}) > 1

    @property
    def prompt(self) -> str:
        """The prompt that it was measured with, or the first of several."""
        templates = way_of(self.rows[0].get("arguments") or {}).get("templates") if self.rows else None
        return templates[0] if templates else "a photo of a {}"

    @property
    def run_model(self) -> str | None:
        """What the run calls its base model, unless that is a folder."""
        name = self.rows[0].get("model") if self.rows else None
        return name if name and without_paths(name) == name else None

    @property
    def versions(self) -> dict[str, str]:
        return self.rows[0].get("versions", {}) if self.rows else {}

    # ---- what the Hub reads -------------------------------------------------------------------------------------

    @property
    def metadata(self) -> ModelCardData:
        """The card's YAML."""
        tags = ["lora", *(["gated-lora", "hf_gatelora"] if self.summary else []), *self.tags]
        tags += [f"base_model:adapter:{self.base}"] if self.base else []
        results = []
        for row in measured(self.rows)[: tables.LIMIT]:
            results.append(
                EvalResult(
                    task_type=self.pipeline_tag or "image-classification",
                    dataset_type=row.get("dataset") or re.sub(r"[^\w.-]+", "-", f"{row['role']}-{row['data']}"),
                    dataset_name=f"{row['data']} ({TITLES[row['role']]})",
                    dataset_split=_split_of(row),
                    dataset_revision=row.get("revision"),
                    metric_type="accuracy" if row["metric"] in HUB_ACCURACIES else row["metric"],
                    metric_name=metric_of(row).title,
                    metric_value=row["value"],
                )
            )
        return ModelCardData(
            library_name="peft",
            base_model=self.base,
            base_model_relation="adapter" if self.base else None,
            pipeline_tag=self.pipeline_tag,
            tags=tags,
            datasets=self.datasets,
            language=self.language,
            license=self.license,
            model_name=self.name if results else None,
            eval_results=results or None,
        )

    @property
    def eval_entries(self) -> list[EvalResultEntry]:
        """The primary metric of each set that names a data set of the Hub, for `.eval_results/`."""
        entries = []
        for role in TITLES:
            rows = [row for row in measured(self.rows) if "dataset" in row]
            for row in primary_rows(rows, role)[: tables.LIMIT]:
                entries.append(
                    EvalResultEntry(
                        dataset_id=row["dataset"],
                        task_id=_split_of(row) or "default",
                        value=row["value"],
                        dataset_revision=row.get("revision"),
                        notes=f"{TITLES[role]}, {metric_of(row).title}, n = {row['n']}",
                    )
                )
        return entries

    def render(self) -> str:
        """The whole card as Markdown."""
        card = ModelCard.from_template(self.metadata, template_path=str(TEMPLATE), card=self, **TEMPLATE_NAMES)
        return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def hub_id(name: str | None) -> str | None:
    """The name of a base model if it can be one of the Hub; None for a local folder."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _split_of(row: dict) -> str | None:
    """The split of a Hub data set, as in `user/data:test`."""
    return row["split"].rpartition(":")[2] if "dataset" in row and ":" in row["split"] else None


def _rows_of_adapter(rows: list[dict], directory: Path) -> list[dict]:
    needed = ("role", "data", "split", "n")
    if lacking := next((key for row in rows for key in needed if row.get(key) is None), None):
        raise ValueError(f"it has rows without {lacking!r}.")
    methods = {row["method"] for row in rows} - {"base"}
    if len(methods) > 1:
        if directory.absolute().name not in methods:
            raise ValueError(f"it holds rows of several methods ({', '.join(sorted(methods))}), not of one adapter.")
        methods = {directory.absolute().name}
    return [row for row in rows if row["method"] in methods | {"base"}]


def _title(config: dict, rows: list[dict], gated: bool) -> str | None:
    """A name for an adapter that has none, by its base model."""
    run = rows[0].get("model") if rows else None
    base = str(config.get("base_model_name_or_path") or run or "").rstrip("/\\")
    cached = re.search(r"models--.*--([^/]+)/snapshots", base)
    name = cached.group(1) if cached else re.split(r"[/\\]", base)[-1]
    return name and f"{name}-{'gated-lora' if gated else 'lora'}"


TEMPLATE_NAMES: dict[str, Any] = {"text": tables.text, "code": tables.code, "tables": tables, "LIMIT": tables.LIMIT}
TEMPLATE_NAMES |= {"GATE_MAP": GATE_MAP, "FRONTIER": FRONTIER}
