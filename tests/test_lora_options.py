"""LoRA's own options: each works as in stock PEFT, or is refused with a sentence that says what to do."""

import pytest
import torch
from backbones import BACKBONES
from models import Images, outputs_of, randomize
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from test_equivalence import assert_close

from hf_gatelora import GateConfig, attach_gates, lora_targets

# Options that work: (backbone, fields of the LoraConfig, number of gates).
WORKS = {
    "rslora": ("DINOv2", {"use_rslora": True}, 6),
    "dropout": ("DINOv2", {"lora_dropout": 0.3}, 6),
    "init gaussian": ("DINOv2", {"init_lora_weights": "gaussian"}, 6),
    "init orthogonal": ("DINOv2", {"init_lora_weights": "orthogonal"}, 6),
    "init random": ("DINOv2", {"init_lora_weights": False}, 6),
    "rank and alpha patterns": ("DINOv2", {"rank_pattern": {"q_proj": 2, "fc2": 3}, "alpha_pattern": {"fc1": 16}}, 6),
    "head in modules_to_save": ("DINOv2", {"modules_to_save": ["classifier"]}, 6),
    "embedding in modules_to_save": ("Llama", {"modules_to_save": ["embed_tokens"]}, 7),
    "excluded modules": ("DINOv2", {"exclude_modules": ["q_proj"]}, 5),
    "targets as a regex": ("CLIP", {"target_modules": r"vision_model\..*\.fc\d"}, 2),
    "some layers": (
        "Swin",
        {"target_modules": ["fc1", "fc2"], "layers_to_transform": [1], "layers_pattern": "layers"},
        2,
    ),
    "classification task": ("BERT", {"task_type": "SEQ_CLS"}, 6),
    "language modelling task": ("Llama", {"task_type": "CAUSAL_LM"}, 7),
}


def adapted(backbone, **fields):
    base = backbone["model"]()
    # A dict in the table must not be the one that a test's config goes on to change.
    fields = {k: dict(v) if isinstance(v, dict) else v for k, v in fields.items()}
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": lora_targets(base)} | fields))


def training_gradients(backbone, model):
    torch.manual_seed(5)  # the same dropout
    output = model.train()(**backbone["inputs"]())[backbone["output"]]
    (output * torch.linspace(-100, 100, output.numel()).view_as(output)).sum().backward()
    model.eval()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "score" not in n}


def check(backbone, model, reference, count, tmp_path, stock_peft):
    """Parity with all gates open, base with all closed, fold, stock loading and merge with half of them open."""
    gates = attach_gates(model, GateConfig(target_active=0.5))
    assert len(gates.names) == count
    assert_close(outputs_of(backbone, model), outputs_of(backbone, reference), 1e-6)
    expected, actual = training_gradients(backbone, reference), training_gradients(backbone, model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-6)
    with reference.disable_adapter():
        base = outputs_of(backbone, reference)
    gates.set_scores(torch.zeros(count))
    assert torch.equal(outputs_of(backbone, model), base)
    gates.set_scores(torch.linspace(0, 0.2, count))
    gates.freeze()
    expected = outputs_of(backbone, model)
    assert not torch.equal(expected, base)
    gates.save_folded(tmp_path)
    assert_close(stock_peft(backbone, tmp_path), expected, 1e-5)
    PeftModel.from_pretrained(backbone["model"](), tmp_path)  # without a warning
    assert_close(outputs_of(backbone, model.merge_and_unload()), expected, 1e-4)


@pytest.mark.parametrize("option", WORKS)
def test_works(option, tmp_path, stock_peft):
    backbone, fields, count = WORKS[option]
    backbone = BACKBONES[backbone]
    model, reference = adapted(backbone, **fields), adapted(backbone, **fields)
    randomize(model)
    randomize(reference)
    check(backbone, model, reference, count, tmp_path, stock_peft)


def test_eva(tmp_path, stock_peft):
    """EVA gives every layer a rank of its own, and may leave layers out."""
    backbone = BACKBONES["DINOv2"]
    batches = [{"pixel_values": pixels} for pixels in Images(32).pixels.split(8)]
    models = []
    for _ in range(2):
        base = backbone["model"]()
        config = LoraConfig(
            r=4, target_modules=lora_targets(base), init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
        )
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
        torch.manual_seed(0)
        initialize_lora_eva_weights(
            model,
            batches,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda inputs, *_: inputs[0].flatten(0, -2),
            show_progress_bar=False,
        )
        randomize(model)
        models.append(model)
    ranks = {n.rsplit(".lora_A", 1)[0]: len(p) for n, p in models[0].named_parameters() if "lora_A" in n}
    assert len(set(ranks.values())) > 1
    check(backbone, *models, len(ranks), tmp_path, stock_peft)


# Options that are refused: (backbone, fields of the LoraConfig, sentence). bias, pissa, DoRA and lora_bias are in
# test_errors.py.
BY_COLUMNS, BY_ROWS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"]
VARIANT = r"the LoRA variant slot of adapter 'default' is already taken by {}\w*, .* Use plain LoRA"
CHANGES_BASE = "init_lora_weights='{}' changes the base weights .* Use one of .True, False, 'gaussian'"
REFUSED = {
    "olora": ("DINOv2", {"init_lora_weights": "olora"}, CHANGES_BASE.format("olora")),
    "pissa, fast": ("DINOv2", {"init_lora_weights": "pissa_niter_4"}, CHANGES_BASE.format("pissa_niter_4")),
    "lora-ga": ("DINOv2", {"init_lora_weights": "lora_ga"}, CHANGES_BASE.format("lora_ga")),
    "mica": ("DINOv2", {"init_lora_weights": "mica"}, CHANGES_BASE.format("mica")),
    "kasa": ("DINOv2", {"kasa_config": KasaConfig()}, VARIANT.format("Kasa")),
    "velora": ("DINOv2", {"velora_config": VeloraConfig()}, VARIANT.format("Velora")),
    "monteclora": ("DINOv2", {"monteclora_config": MontecloraConfig()}, VARIANT.format("Monteclora")),
    "alora": ("Llama", {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, VARIANT.format("ALora")),
    "bdlora": (
        "Llama",
        {"use_bdlora": BdLoraConfig(BY_COLUMNS, BY_ROWS, 2)},
        VARIANT.format("BdLora"),
    ),
    "layer_replication": (
        "Llama",
        {"target_modules": ["q_proj", "v_proj"], "layer_replication": [(0, 1), (0, 1)]},
        "layer_replication makes layers that share their base weights, .* Leave it out",
    ),
    "trainable tokens": (
        "Llama",
        {"trainable_token_indices": [1, 2]},
        "trainable_token_indices trains embeddings .* name the embedding in modules_to_save",
    ),
    "layers of full names": (
        "DINOv2",
        {"layers_to_transform": [1]},
        r"layers_to_transform=\[1\] has no effect on target_modules that name a module in full, as 'dinov2\.encoder",
    ),
    "attention pooling": (
        "SigLIP",
        {"target_modules": "all-linear"},
        r"vision_model\.head\.attention\.out_proj: nn\.MultiheadAttention reads .*lora_targets\(model\)",
    ),
}


@pytest.mark.parametrize("option", REFUSED)
def test_refused(option):
    backbone, fields, sentence = REFUSED[option]
    model = adapted(BACKBONES[backbone], **fields)
    with pytest.raises(ValueError, match=sentence):
        attach_gates(model, GateConfig(target_active=0.5))


def test_lora_on_bare_parameters_is_refused():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, 4, 4))
            self.linear = torch.nn.Linear(4, 4)

    base = torch.nn.ModuleDict({"experts": Experts()})
    model = get_peft_model(base, LoraConfig(target_modules=["linear"], target_parameters=["experts.weight"]))
    with pytest.raises(TypeError, match=r"experts: a LoRA layer of type ParamWrapper .* out of target_parameters"):
        attach_gates(model, GateConfig(target_active=0.5))
