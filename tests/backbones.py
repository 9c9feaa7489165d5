"""The backbones of the compatibility table: how to make each, its inputs, and what is compared. No hf_gatelora."""

import functools
import tempfile

import torch
import transformers as hf
from models import CLASSES, WIDTH, Images, class_prompt_loss, collate, prompts

LAYER = {**WIDTH, "num_hidden_layers": 1}
VISION = {**LAYER, "image_size": 16, "patch_size": 8}
TEXT = {**LAYER, "vocab_size": 32, "max_position_embeddings": 16}
CLIP_TEXT = {**TEXT, "bos_token_id": 0, "eos_token_id": 31, "pad_token_id": 1}


def pixels(labels=None) -> dict:
    return {"pixel_values": Images(4).pixels}


def patches(values: torch.Tensor) -> dict:
    """Images as SigLIP2 takes them: 2 x 2 patches of 8 x 8 pixels each, flattened."""
    count = len(values)
    cut = values.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(count, 4, -1)
    return {
        "pixel_values": cut,
        "pixel_attention_mask": torch.ones(count, 4, dtype=torch.long),
        "spatial_shapes": torch.full((count, 2), 2),
    }


def tokens(labels: torch.Tensor) -> dict:
    """Six token ids per label, which tell it."""
    return {"input_ids": 2 + (torch.arange(6) + 5 * labels[:, None]) % 28}


def feature_loss(outputs, labels, num_items_in_batch=None):
    """Cross-entropy of the first features, for models without a head."""
    loss = torch.nn.functional.cross_entropy(outputs["pooler_output"][:, :CLASSES], labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def images_and_prompts(rows):
    return {**collate(rows), **prompts()}


def patches_and_prompts(rows):
    batch = collate(rows)
    return {**batch, **patches(batch["pixel_values"]), **prompts()}


def classified_tokens(rows):
    labels = collate(rows)["labels"]
    return {**tokens(labels), "labels": labels}


def continued_tokens(rows):
    batch = classified_tokens(rows)
    return {**batch, "labels": batch["input_ids"]}


# Per kind of model: the inputs and the output that are compared, what Trainer needs to train it, and, where merging
# rounds, how far that moves the output, as a part of its largest value.
CLASSIFIER = {"inputs": pixels, "output": "logits", "trainer": {"data_collator": collate}}
PAIR = {
    "inputs": lambda: {**pixels(), **prompts()},
    "output": "logits_per_image",
    "trainer": {"data_collator": images_and_prompts, "compute_loss_func": class_prompt_loss},
}
PATCH_PAIR = {
    "inputs": lambda: {**patches(Images(4).pixels), **prompts()},
    "output": "logits_per_image",
    "trainer": {"data_collator": patches_and_prompts, "compute_loss_func": class_prompt_loss},
}
FEATURES = {
    "inputs": pixels,
    "output": "pooler_output",
    "trainer": {"data_collator": collate, "compute_loss_func": feature_loss},
}
EIGHT_BIT, FOUR_BIT = {**CLASSIFIER, "merge_error": 0.02}, {**CLASSIFIER, "merge_error": 0.3}
TEXTS = {"inputs": lambda: tokens(torch.arange(4)), "output": "logits"}


def dual_encoder():
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
        hf.ViTConfig(**VISION), hf.BertConfig(**TEXT), projection_dim=8
    )
    return hf.VisionTextDualEncoderModel(config)


@functools.cache
def saved_dinov2() -> tempfile.TemporaryDirectory:
    """Folder with a DINOv2 that is wide enough for blocks of 4-bit weights."""
    folder = tempfile.TemporaryDirectory()
    wide = hf.Dinov2Config(**{**VISION, "hidden_size": 64}, mlp_ratio=2, num_labels=CLASSES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.Dinov2ForImageClassification(wide).save_pretrained(folder.name)
    return folder


def quantised(**config):
    """DINOv2 as bitsandbytes quantises it on loading, without its head."""
    config = hf.BitsAndBytesConfig(**config, llm_int8_skip_modules=["classifier"])
    model = hf.Dinov2ForImageClassification.from_pretrained(saved_dinov2().name, quantization_config=config)
    for module in model.modules():
        # On a CPU that knows bf16 bitsandbytes repacks 4-bit weights at the first evaluation, and cannot train or merge
        # them afterwards. It does not do so on a GPU.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


# Name in the table: (kind, how to make the model, gates that `lora_targets` gives it). "refused" would be
# {behaviour: sentence}.
CASES = {
    "CLIP": (
        PAIR,
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=8)),
        12,
    ),
    "SigLIP": (PAIR, lambda: hf.SiglipModel(hf.SiglipConfig(text_config=CLIP_TEXT, vision_config=VISION)), 12),
    "SigLIP2": (
        PATCH_PAIR,
        lambda: hf.Siglip2Model(hf.Siglip2Config(text_config=CLIP_TEXT, vision_config={**VISION, "num_patches": 4})),
        12,
    ),
    "VisionTextDualEncoder (ViT, BERT)": (PAIR, dual_encoder, 12),
    "ViT": (CLASSIFIER, lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=CLASSES)), 6),
    "DINOv2": (
        CLASSIFIER,
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**VISION, mlp_ratio=2, num_labels=CLASSES)),
        6,
    ),
    "DINOv2 with registers": (
        CLASSIFIER,
        lambda: hf.Dinov2WithRegistersForImageClassification(
            hf.Dinov2WithRegistersConfig(**VISION, mlp_ratio=2, num_labels=CLASSES)
        ),
        6,
    ),
    "DINOv2 with SwiGLU": (
        CLASSIFIER,
        lambda: hf.Dinov2ForImageClassification(
            hf.Dinov2Config(**VISION, mlp_ratio=2, num_labels=CLASSES, use_swiglu_ffn=True)
        ),
        7,
    ),
    "DINOv3 ViT": (FEATURES, lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION)), 6),
    "Swin": (
        CLASSIFIER,
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=16,
                patch_size=4,
                embed_dim=8,
                depths=[1, 1],
                num_heads=[1, 2],
                window_size=2,
                num_labels=CLASSES,
            )
        ),
        13,
    ),
    "ConvNeXt (Conv2d)": (
        CLASSIFIER,
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=4, num_labels=CLASSES)
        ),
        5,
    ),
    "Llama": (
        {**TEXTS, "trainer": {"data_collator": continued_tokens}},
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
        7,
    ),
    "BERT": (
        {**TEXTS, "trainer": {"data_collator": classified_tokens}},
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, num_labels=CLASSES)),
        6,
    ),
    "DINOv2, 8 bit": (EIGHT_BIT, lambda: quantised(load_in_8bit=True), 6),
    "DINOv2, 4 bit": (FOUR_BIT, lambda: quantised(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 6),
    "DINOv2, 4 bit, double quantisation": (
        FOUR_BIT,
        lambda: quantised(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        6,
    ),
}


def _seeded(build):
    torch.manual_seed(0)
    return build().eval()


PLAIN = {"merge_error": 1e-4, "refused": {}}
BACKBONES = {
    name: {**PLAIN, **kind, "name": name, "model": lambda build=build: _seeded(build), "gates": gates}
    for name, (kind, build, gates) in CASES.items()
}
