"""Tiny models built from configs, with data to train them on: no network, no files, no hf_gatelora."""

import torch
from peft import LoraConfig
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2ForImageClassification

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "fc1", "fc2"]
CLASSES = 4
WIDTH = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
VISION = {**WIDTH, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}


def tiny_clip(vocabulary: int = 32, length: int = 8) -> CLIPModel:
    """2 vision and 1 text layer of width 16: 18 blocks."""
    torch.manual_seed(0)
    text = {**WIDTH, "num_hidden_layers": 1, "vocab_size": vocabulary, "max_position_embeddings": length}
    text |= {"bos_token_id": 0, "eos_token_id": vocabulary - 1, "pad_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).eval()


def tiny_dinov2() -> Dinov2ForImageClassification:
    """2 layers of width 16: 12 blocks, and a classification head."""
    torch.manual_seed(0)
    return Dinov2ForImageClassification(Dinov2Config(**VISION, mlp_ratio=2, num_labels=CLASSES)).eval()


def prompts() -> dict:
    """Token ids of one prompt per class."""
    ids = torch.arange(2, 2 + 3 * CLASSES).reshape(CLASSES, 3)
    ids = torch.cat([torch.zeros(CLASSES, 1, dtype=torch.long), ids, torch.full((CLASSES, 1), 31)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Images(Dataset):
    """Random images whose mean tells the class."""

    def __init__(self, count: int = 32):
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(count) % CLASSES
        self.pixels = torch.randn(count, 3, 16, 16, generator=generator) + self.labels[:, None, None, None].float()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def collate(rows: list[dict]) -> dict:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def collate_with_prompts(rows: list[dict]) -> dict:
    return {**collate(rows), **prompts()}


def class_prompt_loss(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs["logits_per_image"], labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


# One entry per model family: how to make the model, its inputs, and what the Trainer needs to train it.
FAMILIES = {
    "clip": {
        "name": "clip",
        "model": tiny_clip,
        "inputs": lambda: {"pixel_values": Images(4).pixels, **prompts()},
        "output": "logits_per_image",
        "trainer": {"data_collator": collate_with_prompts, "compute_loss_func": class_prompt_loss},
    },
    "dinov2": {
        "name": "dinov2",
        "model": tiny_dinov2,
        "inputs": lambda: {"pixel_values": Images(4).pixels},
        "output": "logits",
        "trainer": {"data_collator": collate},
    },
}


def lora_config(model, **kwargs):
    """LoRA on all attention and MLP layers that the model has."""
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [t for t in TARGETS if t in leaves]}
    return LoraConfig(**settings | kwargs)


def randomize(model: torch.nn.Module, seed: int = 3) -> None:
    """Give every LoRA B random values, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@torch.no_grad()
def outputs_of(family: dict, model: torch.nn.Module) -> torch.Tensor:
    """Logits of the family's fixed inputs in evaluation mode; the model's mode is left as it was."""
    training = model.training
    model.eval()
    logits = model(**family["inputs"]())[family["output"]]
    model.train(training)
    return logits
