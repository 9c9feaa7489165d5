"""The backbones of the compatibility table: how to make each, its inputs, and what is compared. No hf_gatelora."""

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


# Per kind of model: the inputs and the output that are compared, and what Trainer needs to train it.
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
TEXTS = {"inputs": lambda: tokens(torch.arange(4)), "output": "logits"}


def dual_encoder():
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
        hf.ViTConfig(**VISION), hf.BertConfig(**TEXT), projection_dim=8
    )
    return hf.VisionTextDualEncoderModel(config)


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
}


def _seeded(build):
    torch.manual_seed(0)
    return build().eval()


BACKBONES = {
    name: {**kind, "name": name, "model": lambda build=build: _seeded(build), "gates": gates, "refused": {}}
    for name, (kind, build, gates) in CASES.items()
}
