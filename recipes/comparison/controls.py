"""The controls of a comparison: linear probe, full fine-tuning, and LoRA with the parameters or blocks of a budget."""

import random
from dataclasses import replace

from peft import get_peft_model
from transformers import set_seed

from hf_gatelora import GateController, GatedLoraTrainingArguments, attach_gates
from hf_gatelora.evaluation.backbone import split_classifier
from hf_gatelora.evaluation.linear_probe import fit_linear_probe
from hf_gatelora.evaluation.suite import ClipSuite
from hf_gatelora.evaluation.zero_shot import image_features
from hf_gatelora.training.arguments import method_runs
from hf_gatelora.training.engines import EngineTrainer
from hf_gatelora.training.openclip import save_open_clip
from hf_gatelora.training.report import Report, StepTimer, cost_rows


def linear_probe(script, args, training: GatedLoraTrainingArguments) -> None:
    """Measure the base model with a linear classifier on its frozen features."""
    base, suite, parts = script.prepare(args, training)
    report = Report(args, training, suite, base)
    model, data, own = base().to(training.device), parts["train_dataset"], None
    if not isinstance(suite, ClipSuite):
        split_classifier(model)[2].load_state_dict(script.fit_head(model, data))
    elif data.labels is None:
        raise ValueError(f"{data.source}: a linear probe needs labels, and there is no column {args.label_column!r}.")
    else:
        features = image_features(model, data, suite.batch_size, "linear probe")
        own = replace(suite, probe=fit_linear_probe(features, data.labels, len(data.class_names)))
    report.start("linear_probe")
    report.measure("linear_probe", model, suite=own)
    report.finish()


def train_full(script, args, training: GatedLoraTrainingArguments) -> None:
    """Train every parameter, and measure what came of it."""
    base, suite, parts = script.prepare(args, training)
    report = Report(args, training, suite, base)
    folder = report.start("full")
    parts.pop("callbacks", None)  # what watches retention compares with a disabled adapter
    set_seed(training.seed)
    ((_, run),) = method_runs(["full"], training, known=("full",))
    trainer = EngineTrainer(base(), run, **parts)
    trainer.add_callback(timer := StepTimer())
    trainer.train(resume_from_checkpoint=run.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    tuned = type(base()).from_pretrained(folder)
    report.measure("full", tuned, cost_rows(trainer, timer, args.train))
    if getattr(args, "save_open_clip", False) and trainer.is_world_process_zero():
        save_open_clip(tuned, folder)
    report.finish()


def searched(script, args, training: GatedLoraTrainingArguments) -> GateController:
    """The gates that a run of these settings would train: their budget, tower by tower, and the modules of each."""
    if training.gate_target_active is None:
        raise ValueError("random and lora_equal need a budget: give --gate_target_active, or random@0.1.")
    model = script.prepare(args, training)[0]()
    return attach_gates(get_peft_model(model, script.lora_config(args, model)), training.gate_config())


def lora_equal(script, args, training: GatedLoraTrainingArguments):
    """Arguments of plain LoRA on every target, of the rank that comes nearest to the budget's parameters."""
    gates = searched(script, args, training)
    # The least rank is 1: with a very small budget that has more parameters than the budget.
    rank = max(1, round(args.lora_r * sum(count for _, count in gates.budget) / len(gates.names)))
    alpha = (args.lora_alpha or args.lora_r) * rank / args.lora_r
    return replace(args, lora_r=rank, lora_alpha=max(1, round(alpha)))


def random_targets(script, args, training: GatedLoraTrainingArguments):
    """Arguments of plain LoRA on as many random targets as the budget opens in each tower."""
    gates, draw = searched(script, args, training), random.Random(training.seed)
    chosen = {gates.names[i] for members, count in gates.budget for i in draw.sample(members, count)}
    return replace(
        args, lora_targets=[module for gate in gates.names if gate in chosen for module in gates.blocks[gate]]
    )
