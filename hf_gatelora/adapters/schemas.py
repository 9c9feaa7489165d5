"""What the files of an adapter may hold: schemas with bounds, and one line on the first field that does not fit."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import PeftType
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

MODULES = 10_000  # of one adapter: larger models with LoRA on every layer have about 1,000
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # would reach the terminal as commands


def printable(text: str) -> str:
    if CONTROL.search(text):
        raise ValueError("it has control characters")
    return text


def known_kind(kind: str) -> str:
    if kind not in [known.value for known in PeftType]:
        raise ValueError("the installed PEFT does not know this kind of adapter")
    return kind


Text = Annotated[str, Field(max_length=4_096), AfterValidator(printable)]
Name = Annotated[str, Field(max_length=512), AfterValidator(printable)]
Names = Annotated[list[Name], Field(max_length=MODULES)]
# A string is a pattern here, also one that lists the names of all modules.
Targets = Names | Annotated[str, Field(max_length=1_000_000), AfterValidator(printable)] | None
Count = Annotated[int, Field(ge=0, le=2**53)]
Rank = Annotated[int, Field(ge=1, le=2**16)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Score = Annotated[float | None, AfterValidator(lambda score: math.nan if score is None else score)]


class Schema(BaseModel):
    """Fields that are not listed are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True)


class AutoMapping(Schema):
    base_model_class: Name | None = None
    parent_library: Name | None = None


class AdapterConfig(Schema):
    peft_type: Annotated[str, AfterValidator(known_kind)]
    base_model_name_or_path: Text | None = None
    revision: Text | None = None
    auto_mapping: AutoMapping | None = None


class LoraConfig(AdapterConfig):
    r: Rank = 8
    lora_alpha: Annotated[int | float, Field(ge=-1e9, le=1e9)] = 8
    bias: Name = "none"
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: bool | Name | None = True
    target_modules: Targets = None
    exclude_modules: Targets = None
    layers_pattern: Targets = None
    modules_to_save: Names | None = None
    rank_pattern: Annotated[dict[Text, Rank], Field(max_length=MODULES)] | None = None
    alpha_pattern: Annotated[dict[Text, Number], Field(max_length=MODULES)] | None = None


class Block(Schema):
    name: Name
    modules: Annotated[Names, Field(min_length=1)]
    score: Score
    gate: Score
    open: bool
    parameters: Count


class Tower(Schema):
    gates: Count
    open: Count


class DescribedBase(Schema):
    class_: Annotated[Name | None, Field(alias="class")] = None
    library: Name = ""
    classes: Annotated[list[Text], Field(max_length=100_000)] | None = None


class GateSettings(Schema):
    tau: Number


class Summary(Schema):
    blocks: Annotated[list[Block], Field(min_length=1, max_length=MODULES)]
    gates: Count
    open: Count
    active_fraction: Share
    towers: Annotated[dict[Text, Tower], Field(max_length=MODULES)]
    phase: Name
    progress: Share
    steps: Count
    total_steps: Count | None
    lora_parameters: Count
    open_parameters: Count
    config: GateSettings
    degenerate: Text | None
    # What earlier versions did not write, or not every command needs.
    adapter_name: Name = "default"
    base_fingerprint: Name = ""
    lora: dict[str, Any] | None = None
    base_model: DescribedBase | None = None
    arguments: dict[str, Any] | None = None
    weights_step: Count | None = None
    scale: Share | None = None
    transformers: Annotated[str, Field(pattern=r"^\d{1,3}\.\d{1,3}(\.\d{1,3})?$")] | None = None


class Row(Schema):
    method: Text
    role: Literal["id", "ood", "retention", "cost"]
    data: Text
    split: Text
    metric: Name
    value: int | float
    n: Count
    seed: int | None = None
    wise: Number = 1.0
    step: Count = 0
    frozen: bool = True
    dataset: Text = ""
    revision: Text | None = None
    model: Text | None = None
    arguments: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None


def checked(schema: Any, data: object, file: Path) -> Any:
    """What a file holds, as its schema reads it.

    Raises:
        ValueError: if it does not fit, naming the first field that does not.
    """
    try:
        return TypeAdapter(schema).validate_python(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field, here = [], data
    for part in found["loc"]:  # without the names that pydantic gives to the alternatives of a field
        if isinstance(here, list) and isinstance(part, int):
            field.append(f"entry {part + 1}" if here is data else str(part))
            here = here[part]
        elif isinstance(here, dict) and (part in here or found["type"] == "missing"):
            field.append(str(part))
            here = here.get(part)
    where = f"{shortened('.'.join(field), 120)}: " if field else ""
    raise ValueError(f"{file}: {where}{shortened(found['msg'])}.")


def shortened(text: object, length: int = 240) -> str:
    """A text of any source as a part of one line: without control characters, and at most `length` characters long."""
    line = " ".join(CONTROL.sub("?", str(text)[: 4 * length]).split())
    return line if len(line) <= length else f"{line[: length - 3]}..."
