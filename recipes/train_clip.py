"""Fine-tune a CLIP with gated LoRA, and measure what it gained and what it kept.

    accelerate launch recipes/train_clip.py recipes/configs/quickstart.yaml --learning_rate 1e-3

Two modes: `classification` (cross-entropy of each image over the texts of all class prompts, text tower included, so
that zero-shot use stays meaningful) and `contrastive` (in-batch, on image-caption pairs). The base model and every
tuned one are evaluated on the ID test set, each OOD set and each retention set.
"""

import sys
from dataclasses import dataclass, field, replace

import torch
import toy_world
from accelerate import PartialState
from common import RecipeArguments, parse_arguments
from data import TOY, LabelledImages
from methods import Task, main
from peft import LoraConfig
from torch.distributed.nn.functional import all_gather
from transformers import CLIPModel, CLIPProcessor
from transformers.integrations import unset_hf_deepspeed_config

from hf_gatelora import GatedLoraTrainingArguments
from hf_gatelora.evaluation.linear_probe import fit_linear_probe
from hf_gatelora.evaluation.suite import ClipSuite
from hf_gatelora.evaluation.templates import imagenet_class_names, prompt_templates
from hf_gatelora.evaluation.zero_shot import image_features
from hf_gatelora.layer import check_targets

MODES = ("classification", "contrastive")
TOWERS = ("vision", "text")


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


class Clip(Task):
    """A CLIP checkpoint, trained on images against the texts of their classes or their captions."""

    def __init__(self, arguments: ClipArguments):
        # Under ZeRO-3 transformers would load and make models in parts, where DeepSpeed (seen in 0.19) fails on CLIP's
        # parameter without dimensions. They are partitioned when training starts.
        unset_hf_deepspeed_config()
        self.arguments = arguments
        self.name = str(toy_world.ensure_world() / "model") if arguments.model == TOY else arguments.model
        self.processor = self.load_processor()

    def load_processor(self):
        return CLIPProcessor.from_pretrained(self.name)

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
            raise ValueError(f"{data.source}: a linear probe needs a column {self.arguments.label_column!r}.")
        model = self.base().to(PartialState().device)
        features = image_features(model, data, suite.batch_size, "linear probe")
        return model, replace(suite, probe=fit_linear_probe(features, data.labels, len(data.class_names)))

    def trainer_parts(self, data: LabelledImages) -> dict:
        if self.arguments.mode == "contrastive":
            if data.captions is None:
                column = self.arguments.caption_column
                raise ValueError(f"{data.source}: contrastive training needs a column {column!r}.")

            def collate_pairs(rows):
                texts = self.tokens([row["captions"] for row in rows])
                labels = torch.arange(len(rows))  # each image belongs to the text in its place
                return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), **texts, "labels": labels}

            return {"data_collator": collate_pairs, "compute_loss_func": contrastive_loss}

        if data.labels is None:
            raise ValueError(f"{data.source}: classification needs a column {self.arguments.label_column!r}.")
        classes = self.tokens([self.arguments.prompt.format(name.replace("_", " ")) for name in data.class_names])

        def collate(rows):
            batch = {key: torch.stack([row[key] for row in rows]) for key in ("pixel_values", "labels")}
            return {**batch, **classes}

        return {"data_collator": collate, "compute_loss_func": class_prompt_loss}


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


if __name__ == "__main__":
    main(Clip, *parse_arguments([ClipArguments, GatedLoraTrainingArguments], sys.argv[1:]))
