"""Private and undocumented names of other packages that the code uses: a version that loses one fails here, by name."""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch
from models import FAMILIES, lora_config, outputs_of, randomize
from peft import get_peft_model
from torch import nn

from hf_gatelora import GateConfig, attach_gates
from hf_gatelora.gates import lora_layers

PACKAGE = Path(__file__).parents[1] / "hf_gatelora"

# (module, name in it, what for). The name is an attribute of the module, or one that its source text assigns.
NAMES = [
    # torch: what the fused path must know to step aside
    ("torch._C", "_are_functorch_transforms_active", "torch.func transforms allow no writing over"),
    ("torch.autograd.forward_ad", "_current_level", "nor does forward-mode AD"),
    ("torch.nn.modules.module", "_has_any_global_hook", "global hooks see every call"),
    ("torch.nn.modules.module", "Module._apply", "scores stay fp32 when a model is cast"),
    ("torch.nn.modules.module", "_forward_hooks", "hooks see a module's call"),
    ("torch.nn.modules.module", "_forward_pre_hooks", "hooks see a module's call"),
    ("torch.nn.modules.module", "_backward_hooks", "hooks see a module's call"),
    ("torch.nn.modules.module", "_backward_pre_hooks", "hooks see a module's call"),
    ("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack", "selective checkpointing keeps outputs"),
    # torch: elsewhere
    ("torch", "_foreach_copy_", "one launch for the state of all gates"),
    (
        "torch.nn.parallel",
        "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
        "every rank computes the gates' buffers alike",
    ),
    ("torch.nn.parallel.distributed", "_ddp_params_and_buffers_to_ignore", "what a model ignores already"),
    # PEFT: the seam
    ("peft.tuners.lora.layer", "LoraVariant", "decides how a LoRA layer computes and merges"),
    ("peft.tuners.lora.layer", "lora_variant", "the slot for it"),
    ("peft.tuners.lora", "LoraLayer.adapter_layer_names", "what holds an adapter's parameters"),
    ("peft.tuners.lora", "LoraLayer.other_param_names", "and its settings"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer.get_base_layer", "the layer that PEFT wrapped"),
    ("peft.utils.other", "get_pattern_key", "which rank or alpha pattern is a module's"),
    # transformers: hooks of Trainer without a public one
    ("transformers", "Trainer._prepare_for_training", "the model as the engine takes it over"),
    ("transformers", "Trainer._load_from_checkpoint", "the weights of a checkpoint"),
    ("transformers", "Trainer._load_optimizer_and_scheduler", "when DeepSpeed has loaded them"),
    ("transformers", "Trainer._load_best_model", "the best model"),
    ("transformers", "Trainer._save", "what is written of a model"),
    ("transformers", "Trainer._save_checkpoint", "the mark of a complete checkpoint goes first and comes last"),
    ("transformers", "Trainer._get_output_dir", "where that checkpoint lies"),
    ("transformers", "Trainer._save_rng_state", "the last part of a checkpoint before its state"),
    ("transformers", "Trainer._determine_best_metric", "no evaluation before the freeze is the best"),
    ("transformers", "Trainer._hp_search_setup", "a trial's settings before its model is made"),
    ("transformers", "Trainer._push_from_checkpoint", "pushes during the training"),
    ("transformers", "Trainer._finish_current_push", "pushes during the training"),
    ("transformers.trainer", "loss_is_scaled_for_ga", "how a loss is scaled for accumulation"),
    ("transformers.trainer", "current_gradient_accumulation_steps", "how a loss is scaled for accumulation"),
    ("transformers.trainer", "model_accepts_loss_kwargs", "how a loss is scaled for accumulation"),
    ("transformers.integrations", "unset_hf_deepspeed_config", "loads CLIP whole under ZeRO-3"),
    ("transformers.integrations.integration_utils", "_SummaryWriter", "TensorBoard's writer, to show pictures"),
    ("transformers.integrations.integration_utils", "_wandb", "W&B, to show pictures"),
    ("transformers.integrations.integration_utils", "_trackio", "Trackio, to show pictures"),
    ("transformers.integrations.integration_utils", "_initialized", "whether Trackio's run is open"),
    # accelerate
    ("accelerate.commands.env", "env_command", "what `accelerate env` reports, for doctor"),
    ("accelerate.commands.env", "env_command_parser", "its arguments"),
    ("accelerate.accelerator", "_optimizers", "closed blocks leave a loop's optimizers before its state is loaded"),
    # DeepSpeed: how it holds parameters
    ("deepspeed.utils.tensor_fragment", "_hp_mapping", "ZeRO updates the parameter"),
    ("deepspeed.utils.tensor_fragment", "hp_fragment", "the flat copy that its optimizer updates"),
    ("deepspeed.runtime.zero.stage3", "_z3_optimizer", "the ZeRO-3 optimizer of a parameter"),
    ("deepspeed.runtime.zero.stage3", "fp16_groups", "the groups of ZeRO-3's optimizer"),
    ("deepspeed.runtime.zero.stage_1_and_2", "bit16_groups", "the groups of ZeRO's optimizer"),
    ("deepspeed.runtime.zero.partition_parameters", "ds_id", "ZeRO-3 partitions the parameter"),
    ("deepspeed.runtime.zero.partition_parameters", "ds_shape", "shape of the whole parameter"),
    ("deepspeed.runtime.zero.partition_parameters", "ds_tensor", "this process's part"),
    # argparse
    ("argparse", "_ExtendAction", "which options may be repeated"),
    ("argparse", "_actions", "the options of a parser, by their names in a YAML file"),
    # evaluate
    ("evaluate", "Metric._build_data_dir", "no folder for metrics that keep nothing there"),
]


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, name, _ in NAMES])
def test_private_names_exist(module, name):
    if module.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    owner = import_module(module)
    for part in name.split("."):
        if not hasattr(owner, part):
            assert inspect.ismodule(owner), f"{module} has no {name} any more"
            assert part in inspect.getsource(owner), f"{module} knows no {name} any more"
            return
        owner = getattr(owner, part)


def test_every_private_name_is_listed():
    """Attributes and imports with a leading underscore that the package does not define itself."""
    listed = {part for _, name, _ in NAMES for part in name.split(".")} | {"_C", "_python_dispatch"}
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    own = {n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for t in trees for n in ast.walk(t) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr not in own:
                found.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("_"):
                inherited = isinstance(node.func.value, ast.Call) and ast.unparse(node.func.value) == "super()"
                found |= {node.func.attr} if inherited else set()
            if isinstance(node, ast.ImportFrom) and not node.level:
                found |= {alias.name for alias in node.names}
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                found |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    private = {name for name in found if name.startswith("_") and not name.startswith("__")} - own
    private |= {name for name in found if name.startswith("_") and not name.startswith("__") and name in listed}
    assert {"_foreach_copy_", "_save", "_hp_mapping", "_current_level"} <= private
    assert private <= listed


@pytest.mark.parametrize("missing", ["GLOBAL_HOOKS", "TRANSFORMS", "DISPATCH_MODES", "HOOKS", "_current_level"])
def test_without_a_private_name_the_plain_path_computes_the_same(missing, monkeypatch):
    def run():
        family = FAMILIES["dinov2"]
        base = family["model"]()
        model = get_peft_model(base, lora_config(base))
        randomize(model)
        attach_gates(model, GateConfig(target_active=0.5))
        model(**family["inputs"]()).logits.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return outputs_of(family, model), gradients

    class Fused(lora_layers.AddGated):
        calls = 0

        @classmethod
        def apply(cls, *args):
            Fused.calls += 1
            return super().apply(*args)

    expected, gradients = run()
    monkeypatch.setattr(lora_layers, "AddGated", Fused)
    run()
    assert Fused.calls, "the fused path is taken"
    before = Fused.calls
    if missing == "_current_level":
        monkeypatch.delattr(torch.autograd.forward_ad, missing)
    elif missing == "HOOKS":
        monkeypatch.setattr(lora_layers, missing, ("_hooks_of_another_name",))
    else:
        monkeypatch.setattr(lora_layers, missing, None)
    outputs, others = run()
    assert Fused.calls == before, "and not without the name"
    torch.testing.assert_close(outputs, expected, atol=1e-6, rtol=0)
    assert others.keys() == gradients.keys()
    for name, gradient in others.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-5, rtol=1e-5)
    assert isinstance(nn.Linear(1, 1)._forward_hooks, dict)
