"""A tiny DINOv2-shaped backbone with a classification head, pretrained on the toy world.

It starts from the vision tower of the toy CLIP and learns to name all three factors of a picture (colour, texture,
shape: 320 classes) in the pretraining styles. The architecture is DINOv2's, the pretraining is supervised.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
import toy_world
from huggingface_hub import constants
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, CLIPModel, Dinov2Config, Dinov2ForImageClassification

PICTURES, STEPS, BATCH, LR = 6400, 400, 96, 2e-3
PLACES = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.out_proj",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def from_clip(clip: CLIPModel) -> Dinov2ForImageClassification:
    """A DINOv2 with the weights of a CLIP's vision tower, but for the layer norm before its first layer."""
    vision = clip.config.vision_config
    config = Dinov2Config(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        mlp_ratio=vision.intermediate_size // vision.hidden_size,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        id2label=dict(enumerate(toy_world.KINDS)),
        label2id={kind: i for i, kind in enumerate(toy_world.KINDS)},
    )
    torch.manual_seed(0)
    model, source = Dinov2ForImageClassification(config), clip.vision_model.state_dict()
    own = model.dinov2.state_dict()
    for i in range(config.num_hidden_layers):
        for here, there in PLACES.items():
            for kind in ("weight", "bias"):
                own[f"encoder.layer.{i}.{here}.{kind}"] = source[f"encoder.layers.{i}.{there}.{kind}"]
    for kind in ("weight", "bias"):
        own[f"layernorm.{kind}"] = source[f"post_layernorm.{kind}"]
    own["embeddings.cls_token"] = source["embeddings.class_embedding"][None, None]
    own["embeddings.position_embeddings"] = source["embeddings.position_embedding.weight"][None]
    own["embeddings.patch_embeddings.projection.weight"] = source["embeddings.patch_embedding.weight"]
    model.dinov2.load_state_dict(own)
    return model


def pretrain(model: Dinov2ForImageClassification, bar: tqdm) -> None:
    """Learn to name the kind of each picture."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn, kinds = toy_world.draw_set(toy_world.PRETRAIN_STYLES, PICTURES, 97, bar)
    drawn, kinds = torch.from_numpy(drawn), torch.from_numpy(kinds)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / 30, 1.2 * (1 - step / STEPS), 1)
        pick = torch.randint(len(drawn), (BATCH,), generator=generator)
        pixels = toy_world.to_pixels(drawn[pick])
        logits = model(pixel_values=(pixels.flip(-1) if step % 2 else pixels).to(device)).logits
        optimizer.zero_grad()
        F.cross_entropy(logits, kinds[pick].to(device)).backward()
        optimizer.step()
        bar.update(BATCH)
    model.cpu().eval()


def ensure_backbone() -> Path:
    """Return the folder of the backbone with its image processor; it is built on first use."""
    world = toy_world.ensure_world()
    code = Path(__file__).read_bytes() + Path(toy_world.__file__).read_bytes()
    folder = Path(constants.HF_HOME) / "hf_gatelora" / f"toy-backbone-{hashlib.sha256(code).hexdigest()[:10]}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        with torch.random.fork_rng():
            model = from_clip(CLIPModel.from_pretrained(world / "model"))
            with tqdm(total=PICTURES + STEPS * BATCH, desc="pretraining the toy backbone", unit=" pictures") as bar:
                pretrain(model, bar)
        model.save_pretrained(scratch)
        AutoImageProcessor.from_pretrained(world / "model").save_pretrained(scratch)
        os.chmod(scratch, 0o755)
        try:
            os.rename(scratch, folder)
        except OSError:  # not empty: another process was faster
            if not folder.is_dir():
                raise
        else:
            os.mkdir(scratch)  # for the context manager to remove
    return folder
