"""Fine-tune a CLIP with gated LoRA, and measure what it gained and what it kept.

    accelerate launch recipes/train_clip.py recipes/configs/quickstart.yaml --learning_rate 1e-3

Two modes: `classification` (cross-entropy of each image over the texts of all class prompts, text tower included, so
that zero-shot use stays meaningful) and `contrastive` (in-batch, on image-caption pairs). The base model and every
tuned one are evaluated on the ID test set, each OOD set and each retention set.

`--model open_clip:ViT-B-32/laion2b_s34b_b79k` (a tag or a checkpoint file; none: random weights) or
`open_clip:hf-hub:user/repo` takes a model of open_clip, and `--save_open_clip` gives the tuned ones back to it.
"""

import hashlib
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import toy_world
from accelerate import PartialState
from common import TOY, RecipeArguments, missing_column, parse_arguments
from huggingface_hub import constants
from methods import ADAPTER_FILE, Task, main
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import save_file
from torch.distributed.nn.functional import all_gather
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.integrations import unset_hf_deepspeed_config

from hf_gatelora import GatedLoraTrainingArguments, export_open_clip, load_open_clip
from hf_gatelora.adapters.bases import load_config
from hf_gatelora.evaluation.images import LabelledImages
from hf_gatelora.evaluation.linear_probe import fit_linear_probe
from hf_gatelora.evaluation.suite import ClipSuite
from hf_gatelora.evaluation.templates import imagenet_class_names, prompt_templates
from hf_gatelora.evaluation.zero_shot import image_features
from hf_gatelora.gates.lora_layers import check_targets

MODES = ("classification", "contrastive")
TOWERS = ("vision", "text")
OPEN_CLIP, OPEN_CLIP_FILE = "open_clip:", "open_clip_model.safetensors"


@dataclass
class ClipArguments(RecipeArguments):
    """Model, data and task. A source is `toy:SET`, a file, a folder or a Hub id, with an optional `:split`."""

    mode: str = field(default="classification", metadata={"help": "classification or contrastive"})
    prompt: str = field(default="a photo of a {}", metadata={"help": "class prompt, with {} for the class name"})
    templates: str = field(
        default=None,
        metadata={"help": "evaluate with an ensemble of prompts: simple or openai; default: the one of --prompt"},
    )
    imagenet: list[str] = field(
        default_factory=list,
        metadata={"help": "names of sets with ImageNet's 1000 classes in its order: they get open_clip's class names"},
    )
    caption_column: str = field(default="caption", metadata={"help": "column of the captions"})
    towers: list[str] = field(
        default_factory=lambda: ["vision", "text"], metadata={"help": "which towers get LoRA blocks: vision, text"}
    )
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        metadata={"help": "names of the modules that get a LoRA block"},
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.towers, str):
            self.towers = [self.towers]
        if self.mode not in MODES:
            raise ValueError(f"--mode {self.mode!r} is not known: use one of {MODES}.")
        if not self.towers or not set(self.towers) <= set(TOWERS):
            raise ValueError(f"--towers {self.towers} is not known: use some of {TOWERS}.")
        if "{}" not in self.prompt:
            raise ValueError(f"--prompt {self.prompt!r} has no {{}} for the class name.")


@dataclass
class ExportArguments:
    """What is written beside adapters and results."""

    save_open_clip: bool = field(
        default=False,
        metadata={"help": f"also write each tuned model, merged, for open_clip: OUTPUT_DIR/METHOD/{OPEN_CLIP_FILE}"},
    )


class Clip(Task):
    """A CLIP checkpoint, trained on images against the texts of their classes or their captions."""

    def __init__(self, arguments: ClipArguments):
        # Under ZeRO-3 transformers would load and make models in parts, where DeepSpeed (seen in 0.19) fails on CLIP's
        # parameter without dimensions. They are partitioned when training starts.
        unset_hf_deepspeed_config()
        self.arguments = arguments
        self.name = arguments.model
        if self.name == TOY:
            self.name = str(toy_world.ensure_world() / "model")
        elif self.name.startswith(OPEN_CLIP):
            self.name = str(converted(self.name.removeprefix(OPEN_CLIP)))
        kind = load_config(self.name).model_type
        if kind != CLIPConfig.model_type:
            raise ValueError(f"--model {arguments.model} is a {kind}, not a CLIP. Image classifiers: train_dinov2.py.")
        self.processor = self.load_processor()

    def load_processor(self):
        # open_clip resizes with PIL.
        backend = {"backend": "pil"} if self.arguments.model.startswith(OPEN_CLIP) else {}
        return CLIPProcessor.from_pretrained(self.name, **backend)

    def base(self) -> CLIPModel:
        unset_hf_deepspeed_config()
        return CLIPModel.from_pretrained(self.name, dtype=torch.float32)

    def pixels(self, image) -> torch.Tensor:
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Token ids and attention mask, each of shape (n, length)."""
        encoded = self.processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def lora_config(self, model, r, alpha):
        targets = self.arguments.lora_targets
        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=self.arguments.lora_dropout, target_modules=targets)
        check_targets(model, config)  # each name, before they become one pattern
        config.target_modules = rf"({'|'.join(self.arguments.towers)})_model\..*\.({'|'.join(targets)})"
        return config

    def suite(self, sets, batch_size):
        for data in sets:
            if data.name in self.arguments.imagenet:
                names = imagenet_class_names()
                if len(data.class_names or []) != len(names):
                    found = len(data.class_names or [])
                    raise ValueError(f"--imagenet {data.name}: {data.split} has {found} classes, not {len(names)}.")
                data.class_names = names
        templates = prompt_templates(self.arguments.templates) if self.arguments.templates else [self.arguments.prompt]
        return ClipSuite(sets=sets, batch_size=batch_size, tokenize=self.tokens, templates=tuple(templates))

    def linear_probe(self, data, suite):
        if data.labels is None:
            raise missing_column(data, "a linear probe", "label_column", self.arguments.label_column)
        model = self.base().to(PartialState().device)
        features = image_features(model, data, suite.batch_size, "linear probe")
        return model, replace(suite, probe=fit_linear_probe(features, data.labels, len(data.class_names)))

    def trainer_parts(self, data: LabelledImages) -> dict:
        if self.arguments.mode == "contrastive":
            if data.captions is None:
                raise missing_column(data, "contrastive training", "caption_column", self.arguments.caption_column)

            def collate_pairs(rows):
                texts = self.tokens([row["captions"] for row in rows])
                labels = torch.arange(len(rows))  # each image belongs to the text in its place
                return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), **texts, "labels": labels}

            return {"data_collator": collate_pairs, "compute_loss_func": contrastive_loss}

        if data.labels is None:
            raise missing_column(data, "classification", "label_column", self.arguments.label_column)
        classes = self.tokens([self.arguments.prompt.format(name.replace("_", " ")) for name in data.class_names])

        def collate(rows):
            batch = {key: torch.stack([row[key] for row in rows]) for key in ("pixel_values", "labels")}
            return {**batch, **classes}

        return {"data_collator": collate, "compute_loss_func": class_prompt_loss}


def converted(source: str) -> Path:
    """Folder with the transformers checkpoint of a model of open_clip, `NAME`, `NAME/PRETRAINED` or `hf-hub:REPO`.

    Adapters need a base that `from_pretrained` finds, so it is written once, to a folder that is named by its contents.
    """
    located = source.startswith(("hf-hub:", "local-dir:"))
    name, _, pretrained = (source, "", "") if located else source.partition("/")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # random weights are the same in every process, and at every start
        model, processor = load_open_clip(name, pretrained or None)
    digest = hashlib.sha256(f"{model.config}{processor.image_processor}".encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().numpy())
    slug = re.sub(r"[^\w.]+", "-", source)[:60]
    folder = (
        Path(constants.HF_HOME).expanduser().absolute() / "hf_gatelora" / f"open_clip-{slug}-{digest.hexdigest()[:10]}"
    )
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            model.save_pretrained(Path(scratch) / "base")
            processor.save_pretrained(Path(scratch) / "base")
            try:
                os.rename(Path(scratch) / "base", folder)
            except OSError:  # another process was faster, and its folder holds the same
                if not folder.is_dir():
                    raise
    if PartialState().is_main_process:
        print(
            f"{OPEN_CLIP}{source} as a transformers checkpoint: {folder}. Adapters name it as their base. To publish "
            "one, push that folder too, and train with --model USER/REPO."
        )
    return folder


def save_open_clip(folder: Path) -> None:
    """Write the tuned model in a method's folder as a state dict of open_clip, beside it."""
    unset_hf_deepspeed_config()
    if (folder / ADAPTER_FILE).is_file():
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base, dtype=torch.float32), folder)
        model = model.merge_and_unload()
    else:
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    temporary = folder / f".{OPEN_CLIP_FILE}.tmp"
    save_file(export_open_clip(model), temporary)
    os.replace(temporary, folder / OPEN_CLIP_FILE)
    print(f"For open_clip: {folder / OPEN_CLIP_FILE}")


def class_prompt_loss(outputs, labels, num_items_in_batch=None):
    """Cross-entropy of each image over the texts of all classes, as a mean over images."""
    total = torch.nn.functional.cross_entropy(outputs["logits_per_image"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def contrastive_loss(outputs, labels, num_items_in_batch=None):
    """CLIP's loss over the images and texts of all processes, normalised as a mean over pairs."""
    images, texts, state = outputs["image_embeds"], outputs["text_embeds"], PartialState()
    # The scale between cosines and logits: its parameter is out of reach here where an engine partitions it.
    cosines = (images @ texts.T).detach()
    scale = (outputs["logits_per_image"].detach() * cosines).sum() / cosines.square().sum()
    all_images, all_texts = images, texts
    if state.num_processes > 1:
        all_images, all_texts = torch.cat(all_gather(images)), torch.cat(all_gather(texts))
    targets = labels + state.process_index * len(labels)
    total = torch.nn.functional.cross_entropy(scale * images @ all_texts.T, targets, reduction="sum")
    total = total + torch.nn.functional.cross_entropy(scale * texts @ all_images.T, targets, reduction="sum")
    return total / 2 / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def run(argv: list[str]) -> None:
    """Run the recipe from its command line."""
    arguments, training, export = parse_arguments([ClipArguments, GatedLoraTrainingArguments, ExportArguments], argv)
    main(Clip, arguments, training)
    if export.save_open_clip and training.process_index == 0:
        for method in arguments.methods:
            if method != "linear_probe":  # its tower is the base
                save_open_clip(Path(training.output_dir) / method)


if __name__ == "__main__":
    run(sys.argv[1:])
