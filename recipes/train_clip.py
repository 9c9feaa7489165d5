"""Fine-tune a CLIP with gated LoRA, and measure what it gained and what it kept.

    accelerate launch recipes/train_clip.py recipes/configs/quickstart.yaml --learning_rate 1e-3

Two modes: `classification` (cross-entropy of each image over the texts of all class prompts, text tower included, so
that zero-shot use stays meaningful) and `contrastive` (in-batch, on image-caption pairs). The base model and every
tuned one are measured on the ID test set, each OOD set and each retention set.

`--model open_clip:ViT-B-32/laion2b_s34b_b79k` (a tag or a checkpoint file; none: random weights) or
`open_clip:hf-hub:user/repo` takes a model of open_clip, and `--save_open_clip` gives the tuned ones back to it.
"""

import sys
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CLIPModel, CLIPProcessor, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from hf_gatelora import GatedLoraTrainer, GatedLoraTrainingArguments, lora_targets
from hf_gatelora.adapters.bases import load_config
from hf_gatelora.evaluation.suite import ClipSuite
from hf_gatelora.evaluation.templates import imagenet_class_names, prompt_templates
from hf_gatelora.gates.lora_layers import check_targets
from hf_gatelora.training.arguments import (
    RecipeArguments,
    explained_errors,
    method_runs,
    missing_column,
    parse_arguments,
    several,
)
from hf_gatelora.training.engines import EngineTrainer
from hf_gatelora.training.losses import class_prompt_collator, class_prompt_loss, contrastive_loss, pair_collator
from hf_gatelora.training.openclip import PREFIX, open_clip_checkpoint, save_open_clip
from hf_gatelora.training.report import Report, StepTimer, cost_rows


@dataclass
class ClipArguments(RecipeArguments):
    """Model, data and task. A source is a file, a folder or a Hub id, with an optional `:split`."""

    mode: str = field(default="classification", metadata={"help": "classification or contrastive"})
    prompt: str = field(default="a photo of a {}", metadata={"help": "class prompt, with {} for the class name"})
    templates: str = field(
        default=None, metadata={"help": "measure with an ensemble of prompts, simple or openai; default: --prompt"}
    )
    imagenet: list[str] = field(
        default=None,
        metadata=several("names of sets with ImageNet's classes in order: they get open_clip's class names"),
    )
    caption_column: str = field(default="caption", metadata={"help": "column of the captions"})
    towers: list[str] = field(
        default_factory=lambda: ["vision", "text"], metadata={"help": "which towers get LoRA blocks: vision, text"}
    )
    save_open_clip: bool = field(default=False, metadata={"help": "also write each tuned model, merged, for open_clip"})

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("classification", "contrastive"):
            raise ValueError(f"--mode {self.mode!r} is not known: use classification or contrastive.")
        if not self.towers or not set(self.towers) <= {"vision", "text"}:
            raise ValueError(f"--towers {self.towers} is not known: use vision, text or both.")
        if "{}" not in self.prompt:
            raise ValueError(f"--prompt {self.prompt!r} has no {{}} for the class name.")


def prepare(args: ClipArguments, training: GatedLoraTrainingArguments):
    """The base model, the data and how both are measured: `base()`, a suite, and arguments for the Trainer."""
    # The first look at the device is what sets the processes up, as the training arguments (use_cpu) say.
    training.dataloader_pin_memory &= training.device.type == "cuda"
    is_open_clip = args.model.startswith(PREFIX)
    name = str(open_clip_checkpoint(args.model.removeprefix(PREFIX))) if is_open_clip else args.model
    if (kind := load_config(name).model_type) != "clip":
        raise ValueError(f"--model {args.model} is a {kind}, not a CLIP. Image classifiers: train_dinov2.py.")
    # open_clip resizes with PIL.
    processor = CLIPProcessor.from_pretrained(name, **({"backend": "pil"} if is_open_clip else {}))

    def base() -> CLIPModel:
        # Under ZeRO-3 transformers would load models in parts, where DeepSpeed (seen in 0.19) fails on CLIP's parameter
        # without dimensions. They are partitioned when training starts.
        unset_hf_deepspeed_config()
        return CLIPModel.from_pretrained(name, dtype=torch.float32)

    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        encoded = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def pixels(image) -> torch.Tensor:
        return processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def suite_of(sets):
        for data in sets:
            if data.name in (args.imagenet or []):
                if len(data.class_names or []) != 1000:
                    raise ValueError(f"--imagenet {data.name}: {data.split} does not have ImageNet's 1000 classes.")
                data.class_names = imagenet_class_names()
        templates = prompt_templates(args.templates) if args.templates else [args.prompt]
        workers = training.dataloader_num_workers
        batch_size = training.per_device_eval_batch_size
        return ClipSuite(
            sets=sets, batch_size=batch_size, num_workers=workers, tokenize=tokenize, templates=tuple(templates)
        )

    data, load = args.images(pixels, args.caption_column)
    pairs = args.mode == "contrastive"
    if pairs and data.captions is None:
        raise missing_column(data, "contrastive training", "caption_column", args.caption_column)
    if not pairs and data.labels is None:
        raise missing_column(data, "classification", "label_column", args.label_column)
    suite = suite_of(args.eval_sets(load, data.class_names, retrieval=pairs))
    parts = {"train_dataset": data, "processing_class": processor}
    if pairs:
        parts |= {"data_collator": pair_collator(tokenize), "compute_loss_func": contrastive_loss}
    else:
        prompts = tokenize([args.prompt.format(name.replace("_", " ")) for name in data.class_names])
        parts |= {"data_collator": class_prompt_collator(prompts), "compute_loss_func": class_prompt_loss}
    parts |= args.watching(training.eval_strategy, suite_of, load, data.class_names, retrieval=pairs)
    return base, suite, parts


def lora_config(args: ClipArguments, model: CLIPModel) -> LoraConfig:
    """LoRA on the targets in the chosen towers."""
    targets = args.lora_targets or lora_targets(model)
    check_targets(model, LoraConfig(target_modules=targets))
    inside = [name for name, _ in model.named_modules() if name.partition("_model.")[0] in args.towers]
    found = [name for name in inside if any(name == target or name.endswith(f".{target}") for target in targets)]
    if not found:
        raise ValueError(f"--lora_targets {targets} are not in --towers {args.towers}.")
    return LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha or args.lora_r, lora_dropout=args.lora_dropout, target_modules=found
    )


def main(args: ClipArguments, training: GatedLoraTrainingArguments) -> None:
    base, suite, parts = prepare(args, training)
    report = Report(args, training, suite, base)
    for method, run in method_runs(args.methods, training):
        folder = report.start(method)
        set_seed(run.seed)
        model = base()
        model = get_peft_model(model, lora_config(args, model))
        trainer = GatedLoraTrainer(model, run, **parts) if method == "gated" else EngineTrainer(model, run, **parts)
        trainer.add_callback(timer := StepTimer())
        trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
        trainer.save_model(_internal_call=True)  # the push comes when the results are there
        trainer.accelerator.wait_for_everyone()

        # What was written is measured, as users will load it. Each process takes a part of the images.
        tuned = PeftModel.from_pretrained(base(), folder)
        report.measure(method, tuned, cost_rows(trainer, timer, args.train))
        report.publish(trainer)
        if args.save_open_clip and trainer.is_world_process_zero():
            save_open_clip(tuned, folder)
    report.finish()


if __name__ == "__main__":
    with explained_errors():
        main(*parse_arguments([ClipArguments, GatedLoraTrainingArguments], sys.argv[1:]))
