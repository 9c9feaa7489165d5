"""Every behaviour on every backbone: the cells of the compatibility table in hf_gatelora/gates/README.md."""

from pathlib import Path

import pytest
import torch
from backbones import BACKBONES
from compatibility import BEHAVIOURS, table
from conftest import make_trainer
from models import outputs_of, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from test_equivalence import assert_close
from test_resume import assert_identical, end_state
from torch._dynamo.testing import CompileCounter

from hf_gatelora import GateConfig, attach_gates, lora_targets

README = Path(__file__).parents[1] / "hf_gatelora" / "gates" / "README.md"


def cell(behaviour):
    """The test runs on every backbone; where the table says refused, it has to raise that sentence."""
    assert behaviour in BEHAVIOURS

    def wrap(test):
        def run(case, tmp_path, stock_peft):
            sentence = BACKBONES[case]["refused"].get(behaviour)
            if sentence is None:
                test(BACKBONES[case], tmp_path, stock_peft)
            else:
                with pytest.raises((TypeError, ValueError, RuntimeError), match=sentence):
                    test(BACKBONES[case], tmp_path, stock_peft)

        return pytest.mark.parametrize("case", BACKBONES)(run)

    return wrap


def adapted(backbone):
    """Stock LoRA on the backbone's layers, with an adapter that does something."""
    base = backbone["model"]()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(base)))
    randomize(model)
    return model


def gated(backbone, **config):
    model = adapted(backbone)
    return model, attach_gates(model, GateConfig(**{"target_active": 0.5} | config))


def half_open(gates):
    """Half of the scores below tau, the others above."""
    gates.set_scores(torch.linspace(0, 0.2, len(gates.names)))


def gradients(backbone, model) -> dict[str, torch.Tensor]:
    """The LoRA weights' gradients in training mode, dropout included, by parameter name."""
    torch.manual_seed(0)
    output = model.train()(**backbone["inputs"]())[backbone["output"]]
    # Not the sum of squares, which a layer norm at the end keeps constant.
    (output * torch.linspace(-100, 100, output.numel()).view_as(output)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


def merge_error(merged, expected) -> float:
    """The largest difference as a part of the largest value."""
    return ((merged - expected).abs().max() / expected.abs().max()).item()


def trainer_of(backbone, output_dir, **arguments):
    settings = {"max_steps": 8, "gate_target_active": 0.5, "logging_steps": 1, "weight_decay": 0.1}
    base = backbone["model"]()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(base)))
    return make_trainer(backbone, output_dir, model=model, **settings | arguments)


@cell("forward parity")
def test_forward_parity(backbone, tmp_path, stock_peft):
    (model, gates), reference = gated(backbone), adapted(backbone)
    assert len(gates.names) == backbone["gates"]
    assert_close(outputs_of(backbone, model), outputs_of(backbone, reference), 1e-6)
    expected, actual = gradients(backbone, reference), gradients(backbone, model)
    assert actual.keys() == expected.keys()
    assert max(gradient.abs().max() for gradient in expected.values()) > 1
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-6)
    gates.set_scores(torch.zeros(len(gates.names)))
    base = outputs_of(backbone, backbone["model"]())
    assert not torch.equal(outputs_of(backbone, reference), base)
    assert torch.equal(outputs_of(backbone, model), base)


@cell("train")
def test_train(backbone, tmp_path, stock_peft):
    trainer = trainer_of(backbone, tmp_path)
    trainer.train()
    gates, count = trainer.gates, round(0.5 * backbone["gates"])
    assert gates.frozen
    assert gates.open_mask.sum() == count
    assert (gates.scores - 0.15).abs().max() > 1e-3
    assert not gates.scores.requires_grad
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * count
    assert all(p.abs().max() > 0 for n, p in trained.items() if "lora_B" in n), "every open block was trained"
    with trainer.model.disable_adapter():
        assert torch.equal(outputs_of(backbone, trainer.model), outputs_of(backbone, backbone["model"]()))


@cell("fold to stock PEFT")
def test_fold(backbone, tmp_path, stock_peft):
    model, gates = gated(backbone)
    half_open(gates)
    expected = outputs_of(backbone, model)
    gates.save_folded(tmp_path / "before")
    assert_close(stock_peft(backbone, tmp_path / "before"), expected, 1e-5)
    gates.freeze()
    gates.save_folded(tmp_path / "after")
    assert_close(stock_peft(backbone, tmp_path / "after"), outputs_of(backbone, model), 1e-5)
    folded = gates.fold()
    assert type(folded) is PeftModel
    assert sorted(folded.peft_config["default"].target_modules) == sorted(
        gates.names[-round(0.5 * backbone["gates"]) :]
    )


@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to .-bit linear:UserWarning")
@cell("merge")
def test_merge(backbone, tmp_path, stock_peft):
    model, gates = gated(backbone)
    half_open(gates)
    expected = outputs_of(backbone, model)
    model.merge_adapter()
    assert merge_error(outputs_of(backbone, model), expected) <= backbone["merge_error"]
    model.unmerge_adapter()
    gates.freeze()
    expected = outputs_of(backbone, model)
    merged, base = model.merge_and_unload(), backbone["model"]()
    assert merge_error(outputs_of(backbone, merged), expected) <= backbone["merge_error"]
    assert str(merged) == str(base)
    assert set(merged.state_dict()) == set(base.state_dict())


@cell("resume")
def test_resume(backbone, tmp_path, stock_peft):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = trainer_of(backbone, tmp_path, **settings)
    whole.train()
    for step in (2, 4):  # before and after the freeze
        resumed = trainer_of(backbone, tmp_path / "resumed", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_identical(end_state(resumed), end_state(whole), f"from step {step}")


@cell("compile")
def test_compile(backbone, tmp_path, stock_peft):
    """One graph without breaks, which is not made anew when gates open and close."""
    model, gates = gated(backbone)
    expected = outputs_of(backbone, model)  # bitsandbytes sets up its 8-bit layers in their first forward
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    assert_close(outputs_of(backbone, compiled), expected, 1e-6)
    half_open(gates)
    gates.step(0.2)
    assert_close(outputs_of(backbone, compiled), outputs_of(backbone, model), 1e-6)
    assert graphs.frame_count == 1


def test_the_freeze_compiles_once_more():
    backbone = BACKBONES["ViT"]
    model, gates = gated(backbone)
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    before = outputs_of(backbone, compiled)
    gates.freeze()
    after = outputs_of(backbone, compiled)
    assert not torch.equal(after, before)
    assert torch.equal(outputs_of(backbone, compiled), outputs_of(backbone, model))
    assert graphs.frame_count == 2


def test_the_readme_holds_the_table():
    _, begin, rest = README.read_text().partition("<!-- compatibility -->\n")
    section, end, _ = rest.partition("\n<!-- /compatibility -->")
    assert begin, "hf_gatelora/gates/README.md has no <!-- compatibility -->"
    assert end, "hf_gatelora/gates/README.md has no <!-- /compatibility -->"
    assert section == table(), "write the output of `python tests/compatibility.py` there"
