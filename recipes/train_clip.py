"""Fine-tune a CLIP with gated LoRA, and measure what it gained and what it kept.

    accelerate launch recipes/train_clip.py recipes/configs/quickstart.yaml --learning_rate 1e-3

Two modes: `classification` (cross-entropy of each image over the texts of all class prompts, text tower included, so
that zero-shot use stays meaningful) and `contrastive` (in-batch, on image-caption pairs). The base model and every
tuned one are evaluated on the ID test set, each OOD set and each retention set.
"""

import sys
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import toy_world
from accelerate import PartialState
from common import TOY, LabelledImages, StepTimer, parse_arguments, parse_named_sources, table
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.nn.functional import all_gather
from transformers import CLIPModel, CLIPProcessor, Trainer, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from hf_gatelora import GatedLoraTrainer, GatedLoraTrainingArguments
from hf_gatelora.engines import EngineTrainer
from hf_gatelora.evaluation.results import Results, read_results
from hf_gatelora.evaluation.retrieval import recall_at
from hf_gatelora.evaluation.zero_shot import image_features, text_features, top1_accuracy
from hf_gatelora.hub.plots import gate_map
from hf_gatelora.layer import check_targets

MODES = ("classification", "contrastive")
TOWERS = ("vision", "text")
METHODS = ("gated", "lora")


@dataclass
class ClipArguments:
    """Model, data and task. A source is `toy:SET`, a file, a folder or a Hub id, with an optional `:split`."""

    model: str = field(default=None, metadata={"help": "Hub id or folder of a CLIPModel, or toy"})
    train: str = field(default=None, metadata={"help": "source of the training images"})
    test: str = field(default=None, metadata={"help": "source of the ID test images"})
    ood: list[str] = field(
        default=None, metadata={"help": "name=source of an OOD set; may be repeated", "action": "extend"}
    )
    retention: list[str] = field(
        default=None, metadata={"help": "name=source of a retention set; may be repeated", "action": "extend"}
    )
    mode: str = field(default="classification", metadata={"help": "classification or contrastive"})
    methods: list[str] = field(default_factory=lambda: ["gated"], metadata={"help": "what to train: gated, lora"})
    prompt: str = field(default="a photo of a {}", metadata={"help": "class prompt, with {} for the class name"})
    label_column: str = field(default="label", metadata={"help": "column of the class labels"})
    caption_column: str = field(default="caption", metadata={"help": "column of the captions"})
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int = field(default=None, metadata={"help": "alpha; default: the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before A"})
    towers: list[str] = field(
        default_factory=lambda: ["vision", "text"], metadata={"help": "which towers get LoRA blocks: vision, text"}
    )
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        metadata={"help": "names of the modules that get a LoRA block"},
    )

    def __post_init__(self):
        for name in ("methods", "towers", "lora_targets"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        for name in ("model", "train", "test"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is missing: give it on the command line or in the YAML file.")
        if self.mode not in MODES:
            raise ValueError(f"--mode {self.mode!r} is not known: use one of {MODES}.")
        if not set(self.methods) <= set(METHODS):
            raise ValueError(f"--methods {self.methods} is not known: use some of {METHODS}.")
        if not self.towers or not set(self.towers) <= set(TOWERS):
            raise ValueError(f"--towers {self.towers} is not known: use some of {TOWERS}.")
        if "{}" not in self.prompt:
            raise ValueError(f"--prompt {self.prompt!r} has no {{}} for the class name.")


class Clip:
    """A CLIP checkpoint: models with its weights, and its image and text preprocessing."""

    def __init__(self, name: str):
        # Under ZeRO-3 transformers would load and make models in parts, where DeepSpeed (seen in 0.19) fails on CLIP's
        # parameter without dimensions. They are partitioned when training starts.
        unset_hf_deepspeed_config()
        self.name = str(toy_world.ensure_world() / "model") if name == TOY else name
        self.processor = CLIPProcessor.from_pretrained(self.name)

    def model(self) -> CLIPModel:
        unset_hf_deepspeed_config()
        return CLIPModel.from_pretrained(self.name, dtype=torch.float32)

    def pixels(self, image) -> torch.Tensor:
        return self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]

    def tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        encoded = self.processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def prompts(clip: Clip, arguments: ClipArguments, class_names: list[str]) -> dict[str, torch.Tensor]:
    """Tokens of one prompt per class."""
    return clip.tokens([arguments.prompt.format(name.replace("_", " ")) for name in class_names])


def trainer_parts(clip: Clip, arguments: ClipArguments, train: LabelledImages) -> dict:
    """Collator and loss of the mode, as arguments of a Trainer."""
    if arguments.mode == "contrastive":
        if train.captions is None:
            raise ValueError(f"{train.source}: contrastive training needs a column {arguments.caption_column!r}.")

        def collate_pairs(rows):
            texts = clip.tokens([row["captions"] for row in rows])
            labels = torch.arange(len(rows))  # each image belongs to the text in its place
            return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), **texts, "labels": labels}

        return {"data_collator": collate_pairs, "compute_loss_func": contrastive_loss}

    if train.labels is None:
        raise ValueError(f"{train.source}: classification needs a column {arguments.label_column!r}.")
    classes = prompts(clip, arguments, train.class_names)

    def collate(rows):
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("pixel_values", "labels")}
        return {**batch, **classes}

    def loss(outputs, labels, num_items_in_batch=None):
        total = torch.nn.functional.cross_entropy(outputs["logits_per_image"], labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return {"data_collator": collate, "compute_loss_func": loss}


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


def evaluate(results: Results, method: str, model, clip: Clip, arguments: ClipArguments, suite: dict, batch_size: int):
    """Measure a model on every set of the suite: accuracy where there are labels, else retrieval."""
    for (role, name), data in suite.items():
        images = image_features(model, data, batch_size, f"{method}: {name}")
        row = {"method": method, "role": role, "n": len(data), "data": name, "split": data.source}
        if data.labels is not None and (arguments.mode == "classification" or data.captions is None):
            classes = text_features(model, prompts(clip, arguments, data.class_names))
            results.add(metric="top1", value=top1_accuracy(images, classes, data.labels), **row)
        else:
            texts = text_features(model, clip.tokens(data.captions))
            to_text, to_image = recall_at(images, texts, data.captions)
            results.add(metric="image_to_text_recall@1", value=to_text, **row)
            results.add(metric="text_to_image_recall@1", value=to_image, **row)


def record_costs(results: Results, method: str, trainer: Trainer, timer: StepTimer, folder: Path, source: str):
    """Record open blocks, parameters, bytes, and seconds per step before and after the freeze."""
    row = {"method": method, "role": "cost", "data": "train", "split": source}
    gates = getattr(trainer, "gates", None)
    adapter = load_file(folder / "adapter_model.safetensors")
    blocks = sum(key.endswith("lora_A.weight") for key in adapter)
    summary = gates.summary() if gates else {"open": blocks, "gates": blocks}
    results.add(metric="open_blocks", value=summary["open"], of=summary["gates"], n=1, **row)
    results.add(metric="trainable_parameters", value=sum(t.numel() for t in adapter.values()), n=1, **row)
    size = (folder / "adapter_model.safetensors").stat().st_size
    results.add(metric="adapter_bytes", value=size, n=1, **row)
    for frozen, phase in ((False, "search" if gates else "all"), (True, "consolidate")):
        if timer.seconds[frozen]:
            n = len(timer.seconds[frozen])
            results.add(metric="seconds_per_step", value=timer.median(frozen), n=n, phase=phase, **row)


def train(
    method: str, clip: Clip, arguments: ClipArguments, training: GatedLoraTrainingArguments, data: LabelledImages
):
    """Train one method; returns its trainer and step timer."""
    set_seed(training.seed)
    model = clip.model()
    lora = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha or arguments.lora_r,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_targets,
    )
    check_targets(model, lora)  # each name, before they become one pattern
    lora.target_modules = rf"({'|'.join(arguments.towers)})_model\..*\.({'|'.join(arguments.lora_targets)})"
    common = {"args": training, "train_dataset": data, "processing_class": clip.processor}
    common |= trainer_parts(clip, arguments, data)
    if method == "gated":
        trainer = GatedLoraTrainer(model, peft_config=lora, **common)
        timer = StepTimer(lambda: trainer.gates.frozen)
    else:
        trainer = EngineTrainer(get_peft_model(model, lora), **common)
        timer = StepTimer()
    trainer.add_callback(timer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    return trainer, timer


def not_default(training: GatedLoraTrainingArguments) -> dict:
    """The training arguments that differ from their defaults."""
    # Not from an instance with the defaults: making one would set the processes up anew, without use_cpu.
    defaults = {f.name: f.default for f in fields(training)}
    return {
        name: value
        for name, value in training.to_dict().items()
        if (value or defaults[name]) and str(value) != str(defaults[name]) and not name.endswith("_token")
    }


def main(argv: list[str]) -> None:
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
    arguments, training = parse_arguments([ClipArguments, GatedLoraTrainingArguments], argv)
    # The labels are not an argument of CLIPModel.forward: Trainer would drop them.
    training.remove_unused_columns, training.label_names = False, ["labels"]
    # The first look at the device is what sets the processes up, as the training arguments (use_cpu) say.
    training.dataloader_pin_memory &= training.device.type == "cuda"
    output, writes = Path(training.output_dir), training.process_index == 0
    with PartialState().main_process_first():  # the first one makes the toy world
        clip = Clip(arguments.model)

    def images(source, class_names=None):
        return LabelledImages(source, clip.pixels, arguments.label_column, arguments.caption_column, class_names)

    data = images(arguments.train)
    suite = {("id", "test"): images(arguments.test, data.class_names)}
    for role in ("ood", "retention"):
        for name, source in parse_named_sources(role, getattr(arguments, role)).items():
            suite[role, name] = images(source, data.class_names if role == "ood" else None)

    stated = {**asdict(arguments), **not_default(training)}
    path = output / "results.jsonl" if writes else None
    results = Results(path, model=arguments.model, seed=training.seed, arguments=stated)
    if training.resume_from_checkpoint and training.resume_from_checkpoint.lower() == "true":
        training.resume_from_checkpoint = True  # the last checkpoint of each method
    elif training.resume_from_checkpoint and len(arguments.methods) > 1:
        raise ValueError(
            "--resume_from_checkpoint FOLDER belongs to one method: give --methods with that one, or true."
        )
    batch_size = training.per_device_eval_batch_size
    for i, method in enumerate(arguments.methods):
        folder = output / method
        training = replace(training, output_dir=str(folder))  # sets the engine up anew
        trainer, timer = train(method, clip, arguments, training, data)
        trainer.save_model()
        if writes and method == "gated":
            gate_map(trainer.gates.summary(), folder / "gate_map.png")
        # What was written is evaluated, as users will load it. Each process takes a part of the data.
        trainer.accelerator.wait_for_everyone()
        model = PeftModel.from_pretrained(clip.model(), str(folder)).to(training.device)
        if i == 0:
            with model.disable_adapter():
                evaluate(results, "base", model, clip, arguments, suite, batch_size)
        evaluate(results, method, model, clip, arguments, suite, batch_size)
        if writes:
            record_costs(results, method, trainer, timer, folder, arguments.train)
    if writes:
        print(f"\n{table(read_results(results.path))}\n")
        print(f"Accuracies in %, with the change against the base. Adapters, figures and results.jsonl: {output}")
    PartialState().destroy_process_group()  # without it a process now and then aborts as it exits


if __name__ == "__main__":
    main(sys.argv[1:])
