"""Started by `test_distributed.py` in every process: `distributed_run.py TASK OUTPUT_FOLDER`."""

import copy
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import DistributedType, PartialState
from conftest import make_trainer
from models import FAMILIES, Images, collate, lora_config, outputs_of, prompts
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_gatelora import GateAnnealingCallback, GateConfig, RetentionCallback, attach_gates
from hf_gatelora.evaluation.suite import ClassifierSuite, EvalSet
from hf_gatelora.evaluation.zero_shot import image_features
from hf_gatelora.gates.engines import engine_for, without_embedding_units
from hf_gatelora.records import ROLES
from hf_gatelora.training.losses import contrastive_loss
from hf_gatelora.training.saving import is_partitioned

# Made before DeepSpeed is set up, which changes how transformers initialises weights.
MODELS = {name: family["model"]() for name, family in FAMILIES.items()}
RUN = {"max_steps": 30, "save_strategy": "steps", "save_steps": 10, "weight_decay": 0.1}


def simulate_accelerators() -> None:
    """Accelerate applies FSDP on accelerators only: from now on the CPU passes for one."""
    initialize = PartialState.__init__

    def pretend(state, *args, **kwargs):
        initialize(state, *args, **kwargs)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend


class OutputsAtSave(TrainerCallback):
    """Keeps the gated model's outputs as they are when a checkpoint is written."""

    def __init__(self, family):
        self.family, self.outputs = family, {}

    def on_evaluate(self, args, state, control, **kwargs):
        self.outputs[state.global_step] = outputs_of(self.family, self.trainer.model_wrapped).tolist()


def suite() -> ClassifierSuite:
    """An odd number of images, with the others as neighbours."""
    others = Images()
    bank = EvalSet("retention", "bank", others, labels=others.labels)
    images = Images(13)
    sets = [EvalSet(role, role, images, labels=images.labels, class_names=list("abcd"), bank=bank) for role in ROLES]
    return ClassifierSuite(sets=sets, batch_size=4, k=3)


def train_and_resume(output: Path) -> None:
    """Train each family without a stop, resume it from before and after the freeze; then the rest of the tests."""
    write(output / "contrastive", {"features": contrastive(output / "contrastive")})
    for name, family in FAMILIES.items():
        folder, outputs = output / name, OutputsAtSave(family)
        settings = {**RUN, "gate_rewind": name == "dinov2"}
        watching = [RetentionCallback(suite())] if name == "dinov2" else []
        evaluation = {"eval_strategy": "steps", "eval_steps": 10, "eval_dataset": Images()}
        evaluation["callbacks"] = [outputs, *watching]
        best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
        trainer = outputs.trainer = make(family, folder, **settings | evaluation | best)
        trainer.train()
        trainer.save_model(folder / "saved")
        trainer.gates.save_folded(folder / "folded")
        try:
            folds = trainer.gates.fold() is not None
        except RuntimeError:
            folds = False
        found = {
            "world": trainer.args.world_size,
            "engine": str(trainer.accelerator.distributed_type).removeprefix("DistributedType."),
            "zero_stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", 0),
            "sharded": is_partitioned(trainer.model),
            "scores": trainer.gates.scores.tolist(),
            "open": trainer.gates.open_mask.tolist(),
            "outputs": outputs.outputs,
            "best_step": trainer.state.best_global_step,
            "best_outputs": outputs_of(family, trainer.model_wrapped).tolist(),
            "folds": folds,
            "watched": [entry for entry in trainer.state.log_history if "eval_retention_delta" in entry],
        }
        if trainer.is_world_process_zero():  # only one process looks
            trainer.gates.summary()
        for step in (10, 20):
            again = make(family, folder / f"resumed-{step}", **settings)
            again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        write(folder, found)
    write(output / "loop", {"open": own_loop(output / "loop" / "folded")})
    if not engine_for(Accelerator()).manages:
        write(output / "stock", {"gradients": stock_trainer(output / "stock")})
    rounded = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "bf16": True}
    make(FAMILIES["dinov2"], output / "bf16", **rounded).train()
    for step in (4, 8):
        again = make(FAMILIES["dinov2"], output / "bf16" / f"resumed-{step}", **rounded)
        again.train(resume_from_checkpoint=str(output / "bf16" / f"checkpoint-{step}"))


def stock_trainer(folder: Path) -> list[float]:
    """Sums of the scores' gradients in each step of a stock Trainer, whose model normalises its loss by itself."""
    sums = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            sums.append(sum(p.grad.item() for p in gates.score_parameters()))

    torch.manual_seed(0)
    base = copy.deepcopy(MODELS["dinov2"])
    model = get_peft_model(base, lora_config(base))
    gates = attach_gates(model, GateConfig(target_active=None, lambda_=0.5, warmup_ratio=0.0, freeze_ratio=1.0))
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=8 // PartialState().num_processes,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=Images(), callbacks=[GateAnnealingCallback(gates), Watch()]).train()
    return sums


def contrastive(folder: Path) -> list:
    """Trains on image-text pairs with the recipe's loss, and embeds an odd number of images; returns the embeddings."""

    def pairs(rows):
        labels = torch.arange(len(rows))
        return {**collate(rows), "input_ids": prompts()["input_ids"][collate(rows)["labels"]], "labels": labels}

    family = {**FAMILIES["clip"], "trainer": {"data_collator": pairs, "compute_loss_func": contrastive_loss}}
    trainer = make(family, folder, max_steps=6)
    trainer.train()
    trainer.save_model(folder)
    return image_features(MODELS["clip"], Images(13), batch_size=4).tolist()


def own_loop(folder: Path) -> list[bool]:
    """The loop of the README, in which nothing but the gates is ours."""
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    torch.manual_seed(0)
    model = copy.deepcopy(MODELS["dinov2"])
    model = get_peft_model(model, lora_config(model))
    gates = attach_gates(model, GateConfig(target_active=0.2))
    loader = torch.utils.data.DataLoader(Images(), batch_size=8 // accelerator.num_processes, collate_fn=collate)
    optimizer = torch.optim.AdamW(gates.param_groups(lr=1e-2))
    with without_embedding_units(model):
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    total = 5 * len(loader)
    for epoch in range(5):
        for step, batch in enumerate(loader):
            loss = model(**batch).loss + gates.penalty()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)  # as the DeepSpeed settings left by Trainer say
            optimizer.step()
            optimizer.zero_grad()
            gates.step((epoch * len(loader) + step + 1) / total)
    gates.save_folded(folder)
    return gates.open_mask.tolist()


class Die(TrainerCallback):
    """Ends this process, as a machine that fails would, at one step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_in_step(output: Path) -> None:
    """Without a stop for reference; then one process dies within step 13."""
    family = FAMILIES["dinov2"]
    make(family, output / "whole", **RUN).train()
    rank = int(os.environ["RANK"])
    make(family, output / "killed", **RUN | {"save_steps": 5, "callbacks": [Die(12)] if rank == 1 else []}).train()


def killed_in_save(output: Path) -> None:
    """Resumes the killed run, in which the writing process now dies halfway through the checkpoint of step 20."""
    trainer = make(FAMILIES["dinov2"], output / "killed", **RUN | {"save_steps": 5})
    save_rng_state = trainer._save_rng_state

    def dying(directory):
        if trainer.state.global_step == 20 and trainer.is_world_process_zero():
            os.kill(os.getpid(), signal.SIGKILL)
        save_rng_state(directory)

    trainer._save_rng_state = dying
    trainer.train(resume_from_checkpoint=True)


def resumed(output: Path) -> None:
    """Resumes once more, to the end."""
    trainer = make(FAMILIES["dinov2"], output / "killed", **RUN | {"save_steps": 5})
    trainer.train(resume_from_checkpoint=True)


def make(family, folder, **arguments):
    batch = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    model = copy.deepcopy(MODELS[family["name"]])
    torch.manual_seed(0)  # for the LoRA layers
    trainer = make_trainer(family, folder, model, per_device_train_batch_size=batch, **arguments)
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        # As in a large model, parameters are partitioned again after each use; those of a small one would stay whole.
        limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        plugin.deepspeed_config["zero_optimization"].update({f"stage3_{limit}": 0 for limit in limits})
    return trainer


def write(folder: Path, found: dict) -> None:
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        simulate_accelerators()
    tasks = {task.__name__: task for task in (train_and_resume, killed_in_step, killed_in_save, resumed)}
    tasks[sys.argv[1]](Path(sys.argv[2]))
    # Everything is written. What torch does with gloo's threads as a process exits aborts it now and then.
    PartialState().wait_for_everyone()
    os._exit(0)
