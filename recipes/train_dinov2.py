"""Fine-tune a DINOv2 or another vision backbone with gated LoRA, and measure what it gained and what it kept.

    accelerate launch recipes/train_dinov2.py recipes/configs/quickstart_dinov2.yaml --learning_rate 1e-3

Any `AutoModelForImageClassification` works that has one head beside its backbone. The head for the new classes is first
fitted on the frozen features and then trained along with the blocks (LP-FT, arXiv 2202.10054). ID and OOD sets are
measured by that head; retention sets by the head that the base model was published with, where it has their classes,
and by k-NN where a bank of labelled images is given.
"""

import sys
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, set_seed
from transformers.integrations import unset_hf_deepspeed_config

from hf_gatelora import GatedLoraTrainer, GatedLoraTrainingArguments, lora_targets
from hf_gatelora.adapters.bases import load_config, load_reporting, refuse_random
from hf_gatelora.evaluation.backbone import backbone_features, split_classifier
from hf_gatelora.evaluation.images import LabelledImages, parse_named_sources
from hf_gatelora.evaluation.linear_probe import fit_linear_probe
from hf_gatelora.evaluation.published import classifier_suite
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
from hf_gatelora.training.losses import collate_images
from hf_gatelora.training.report import Report, StepTimer, cost_rows


@dataclass
class ClassifierArguments(RecipeArguments):
    """Model, data and task. A source is a file, a folder or a Hub id, with an optional `:split`."""

    bank: list[str] = field(
        default=None,
        metadata=several("name=source of labelled images that vote in k-NN on the retention set of that name"),
    )
    head_label_map: list[str] = field(
        default=None,
        metadata=several(
            "name=JSON file {class of that retention set, by name or number: output of the published head}"
        ),
    )
    image_size: int = field(default=None, metadata={"help": "side in pixels; default: as the model was published"})
    probe_first: bool = field(
        default=True, metadata={"help": "fit the head on frozen features before training (LP-FT)"}
    )
    knn_k: int = field(default=20, metadata={"help": "neighbours that vote"})
    knn_temperature: float = field(default=0.07, metadata={"help": "temperature of their weights"})


def load_model(name: str, **settings) -> PreTrainedModel:
    """The published model, whole on each process, with a new head if `settings` ask for another number of classes."""
    unset_hf_deepspeed_config()
    model, random = load_reporting(AutoModelForImageClassification, name, **settings)
    head = split_classifier(model)[1]
    refuse_random(name, model, {key for key in random if not key.startswith(f"{head}.")})
    return model


def fit_head(model: PreTrainedModel, data: LabelledImages) -> dict[str, torch.Tensor]:
    """Weights of a head that is fitted on the frozen features."""
    _, name, head = split_classifier(model)
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(
            f"The head {name} of {type(model).__name__} is a {type(head).__name__}, not one linear layer, and cannot "
            "be fitted. Train it along from its initial weights with --probe_first false."
        )
    features = backbone_features(model.to(PartialState().device), data, 64, "fitting the head").head_input
    weight, bias = fit_linear_probe(features, data.labels, len(data.class_names))
    return {"weight": weight, "bias": bias}


def prepare(args: ClassifierArguments, training: GatedLoraTrainingArguments):
    """The base model, the data and how both are measured: `base()`, a suite, and arguments for the Trainer."""
    # The first look at the device is what sets the processes up, as the training arguments (use_cpu) say.
    training.dataloader_pin_memory &= training.device.type == "cuda"
    load_config(args.model)  # says more clearly what is wrong with a model that cannot be found
    processor = AutoImageProcessor.from_pretrained(args.model)
    if args.image_size is not None:
        square = {"height": args.image_size, "width": args.image_size}
        processor.size = {"shortest_edge": args.image_size} if "shortest_edge" in dict(processor.size) else square
        if getattr(processor, "crop_size", None) is not None:
            processor.crop_size = square

    data, load = args.images(lambda image: processor(image, return_tensors="pt")["pixel_values"][0])
    if data.labels is None:
        raise missing_column(data, "classification", "label_column", args.label_column)

    def with_head(head: dict[str, torch.Tensor] | None) -> PreTrainedModel:
        model = load_model(args.model, num_labels=len(data.class_names), ignore_mismatched_sizes=True)
        model.config.id2label = dict(enumerate(data.class_names))
        model.config.label2id = {name: i for i, name in enumerate(data.class_names)}
        if head is not None:
            split_classifier(model)[2].load_state_dict(head)
        return model

    model = with_head(None)
    head = fit_head(model, data) if args.probe_first else split_classifier(model)[2].state_dict()

    maps = parse_named_sources("head_label_map", args.head_label_map)
    config, published = AutoConfig.from_pretrained(args.model), None
    if any(name.endswith("ForImageClassification") for name in config.architectures or []):
        published = split_classifier(load_model(args.model))[2]
    how = {"k": args.knn_k, "temperature": args.knn_temperature, "batch_size": training.per_device_eval_batch_size}
    how["num_workers"] = training.dataloader_num_workers

    def suite_of(sets):
        return classifier_suite(sets, published, config.id2label, maps, **how)

    suite = suite_of(args.eval_sets(load, data.class_names, banks=args.bank))
    parts = {"train_dataset": data, "processing_class": processor, "data_collator": collate_images}
    parts |= args.watching(training.eval_strategy, suite_of, load, data.class_names, args.probe_first)
    return lambda: with_head(head), suite, parts


def lora_config(args: ClassifierArguments, model: PreTrainedModel) -> LoraConfig:
    """LoRA on the targets; the head trains along and is saved with them."""
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha or args.lora_r,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets or lora_targets(model),
        modules_to_save=[split_classifier(model)[1]],
    )
    check_targets(model, config)
    return config


def main(args: ClassifierArguments, training: GatedLoraTrainingArguments) -> None:
    base, suite, parts = prepare(args, training)
    report = Report(args, training, suite, base, trained_head=args.probe_first)
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
    report.finish()


if __name__ == "__main__":
    with explained_errors():
        main(*parse_arguments([ClassifierArguments, GatedLoraTrainingArguments], sys.argv[1:]))
