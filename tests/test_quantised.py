"""Quantised base models: what the compatibility table does not show. Merging beside stock PEFT's, layers by name."""

import pytest
import torch
from backbones import BACKBONES
from conftest import make_trainer
from models import lora_config, outputs_of
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from test_backbones import adapted, gated, half_open, merge_error, trainer_of
from torch import nn

from hf_gatelora import GateConfig, attach_gates, lora_targets

QUANTISED = [name for name in BACKBONES if "bit" in name]


@pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear:UserWarning")
@pytest.mark.parametrize("case", QUANTISED)
def test_merging_rounds_as_stock_peft_does(case, tmp_path):
    """The README's figure is about what merging really costs, and the same adapter costs that in stock PEFT."""
    backbone = BACKBONES[case]
    model, gates = gated(backbone)
    half_open(gates)
    expected = outputs_of(backbone, model)

    def merged_by_stock(folder):
        gates.save_folded(folder)
        return PeftModel.from_pretrained(backbone["model"](), folder).merge_and_unload()

    stock = merged_by_stock(tmp_path / "before")
    model.merge_adapter()
    assert torch.equal(outputs_of(backbone, model), outputs_of(backbone, stock))
    assert backbone["merge_error"] / 4 < merge_error(outputs_of(backbone, stock), expected) <= backbone["merge_error"]

    model, gates = gated(backbone)
    half_open(gates)
    gates.freeze()
    stock = merged_by_stock(tmp_path / "after")
    merged = model.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in backbone["model"]().modules()]
    assert torch.equal(outputs_of(backbone, merged), outputs_of(backbone, stock))
    assert merge_error(outputs_of(backbone, merged), expected) <= backbone["merge_error"]


@pytest.mark.parametrize("case", QUANTISED)
def test_the_compute_cost_counts_weights_not_bytes(case):
    """4-bit weights lie packed."""

    def penalty(model):
        model = get_peft_model(model, LoraConfig(r=4, target_modules=lora_targets(model)))
        gates = attach_gates(model, GateConfig(target_active=None, lambda_=1.0, cost="compute"))
        gates.set_scores(torch.linspace(0, 0.5, len(gates.names)))
        gates.step(0.4)
        return gates.penalty()

    base = BACKBONES[case]["model"]()
    full = type(base)(base.config)
    assert type(full.get_submodule(lora_targets(full)[0])) is nn.Linear
    assert penalty(base) == penalty(full)


@pytest.mark.parametrize("case", QUANTISED)
def test_another_quantised_base_is_refused_at_resume(case, tmp_path):
    backbone = BACKBONES[case]
    trainer_of(backbone, tmp_path, save_strategy="steps", save_steps=2, max_steps=4).train()
    other = adapted(backbone)
    with torch.no_grad():
        weight = other.get_submodule("base_model.model." + lora_targets(other)[0]).get_base_layer().weight
        weight.data.view(-1)[:8] = weight.data.view(-1)[8:16].clone()
    resumed = make_trainer(backbone, tmp_path, model=other, max_steps=4, gate_target_active=0.5)
    with pytest.raises(ValueError, match="is from another base model: the gated layers' base weights differ"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# PEFT's LoRA layers of other quantised weights, here around full ones, which spares their libraries.
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
@pytest.mark.parametrize("kind", [AqlmLoraLinear, AwqLoraLinear, GPTQLoraLinear, TorchaoLoraLinear])
def test_other_quantised_layers_are_refused(kind, monkeypatch):
    backbone = BACKBONES["DINOv2"]
    monkeypatch.setattr(TorchaoLoraLinear, "_check_dtype_supported", lambda self: None)
    base = backbone["model"]()
    config = lora_config(base)
    config._register_custom_module({nn.Linear: kind})
    model = get_peft_model(base, config)
    with pytest.raises(TypeError, match=rf"type {kind.__name__} cannot be gated, .* with BitsAndBytesConfig"):
        attach_gates(model, GateConfig(target_active=0.5))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # PEFT calls it
def test_kbit_training(tmp_path):
    """As QLoRA is set up: norms in fp32, gradient checkpointing."""
    backbone = BACKBONES["DINOv2, 4 bit, double quantisation"]
    runs = []
    for checkpointing in (False, True):
        base = prepare_model_for_kbit_training(backbone["model"](), checkpointing, {"use_reentrant": False})
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=lora_targets(base)))
        runs.append(make_trainer(backbone, tmp_path, model=model, max_steps=8, gate_target_active=0.5))
        assert model.is_activation_checkpointing == checkpointing
        runs[-1].train()
    assert torch.equal(runs[0].gates.open_mask, runs[1].gates.open_mask)
    torch.testing.assert_close(runs[0].gates.scores, runs[1].gates.scores, atol=1e-6, rtol=0)
    assert (runs[0].gates.scores - 0.15).abs().max() > 1e-3
