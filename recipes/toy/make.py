"""Makes the files beside this script once: a small CLIP and a DINOv2-shaped backbone that know the toy world, and data.

    python recipes/toy/make.py [--output DIR]

The pictures are drawn by `draw.py`. Both models learn to name colour, texture and shape in the pretraining styles: the
CLIP from captions; the backbone, which starts from the CLIP's vision tower, as a classifier of 320 kinds. Takes about
three minutes on two idle CPU cores. Other machines and versions give slightly other weights, so the files are part of
the repository, with their hashes in SHA256SUMS.
"""

import argparse
import hashlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image, Value
from draw import FINETUNE_STYLE, KINDS, OOD_STYLES, PRETRAIN_STYLES, SHAPES, SIZE, draw_set
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2ForImageClassification,
)

TEMPLATES = ["a {}", "a photo of a {}"]
# Styles, number of pictures and seed of each file. The last two have three pictures of each kind.
SETS = {
    "sketch-train": ([FINETUNE_STYLE], 600, 1),
    "sketch-test": ([FINETUNE_STYLE], 500, 2),
    **{f"{style}-test": ([style], 400, 3 + i) for i, style in enumerate(OOD_STYLES)},
    "retention-test": (PRETRAIN_STYLES, 960, 99),
    "retention-bank": (PRETRAIN_STYLES, 960, 98),  # labelled neighbours for k-NN
}
PICTURES, BATCH = 20000, 96
CLIP_STEPS, MUON_LR, CLIP_LR = 1100, 0.02, 3e-3
BACKBONE_STEPS, BACKBONE_LR = 400, 2e-3
# Modules of a DINOv2 layer, and of a CLIP vision layer.
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


def save_set(styles: list[str], n: int, seed: int, path: Path) -> None:
    """Write pictures, class labels and captions as a parquet file; outlines are labelled by their shape alone."""
    pictures, labels = draw_set(styles, n, seed)
    names = KINDS
    if styles != PRETRAIN_STYLES:
        names, labels = SHAPES, labels // (len(KINDS) // len(SHAPES))
    rows = {"image": [], "label": labels.tolist(), "caption": [f"a {names[i]}" for i in labels]}
    for picture in pictures:
        picture.save(buffer := io.BytesIO(), "PNG", optimize=True)
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
    features = Features({"image": Image(), "label": ClassLabel(names=names), "caption": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(path)


def make_processor() -> CLIPProcessor:
    """CLIP's tokenizer and image processor for this world: each of its words becomes one token."""
    words = " ".join(TEMPLATES + KINDS + ["shape"]).replace("{}", "").split()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(words, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    # All bytes, also as a word's last: a word from outside the world is spelled out, never "unknown".
    tokens = alphabet + [f"{c}</w>" for c in alphabet] + ["".join(m) for m in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({t: i for i, t in enumerate(tokens)}, merges, model_max_length=32)
    square = {"height": SIZE, "width": SIZE}
    half = [0.5] * 3
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=half, image_std=half, do_convert_rgb=True
    )
    return CLIPProcessor(images, tokenizer)


def make_clip(tokenizer: CLIPTokenizer, pixels: Tensor) -> CLIPModel:
    """An untrained CLIP: 8 vision and 2 text layers, thus (8 + 2) x 6 = 60 linear blocks.

    There are only 2 x 2 large patches, because a vision transformer learns a shape in far fewer steps when it sees it
    in few pieces; the patch embedding starts as a whitening of the patches for the same reason.
    """
    width, patch = 96, SIZE // 2
    tower = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 2 * width}
    text = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = {"num_hidden_layers": 8, "image_size": SIZE, "patch_size": patch}
    model = CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=width))
    patches = F.unfold(pixels, patch, stride=patch).transpose(0, 1).flatten(1)  # (values of a patch, patches)
    variances, axes = torch.linalg.eigh(patches.cov())  # in ascending order
    with torch.no_grad():
        embeddings = model.vision_model.embeddings
        whitening = (axes / (variances + 0.1).sqrt())[:, -width:].T
        embeddings.patch_embedding.weight.copy_(whitening.view_as(embeddings.patch_embedding.weight))
        embeddings.position_embedding.weight.normal_(std=0.7)
    return model


def to_pixels(pictures: Tensor) -> Tensor:
    """What the image processor makes of pictures (n, SIZE, SIZE, 3)."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def batches(pictures: Tensor, kinds: Tensor, optimizers: list[torch.optim.Optimizer], steps: int, title: str):
    """Yield step, pixels and kinds of random pictures, every other batch mirrored; the loss is on its way back then.

    The learning rate warms up for 30 steps and then decays linearly.
    """
    rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(0)
    for step in tqdm(range(steps), title, unit=" steps"):
        for group, peak in rates:
            group["lr"] = peak * min((step + 1) / 30, 1.2 * (1 - step / steps), 1)
        pick = torch.randint(len(pictures), (BATCH,), generator=generator)
        pixels = to_pixels(pictures[pick])
        for optimizer in optimizers:
            optimizer.zero_grad()
        yield step, pixels.flip(-1) if step % 2 else pixels, kinds[pick]
        for optimizer in optimizers:
            optimizer.step()


def pretrain_clip(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Tensor, kinds: Tensor) -> None:
    """Match every picture with its captions - single words and all three - among those of its batch."""
    colour, texture, shape = zip(*(kind.split() for kind in KINDS))
    views = [shape, [f"{c} shape" for c in colour], [f"{t} shape" for t in texture], KINDS]
    weights = [1.0, 0.3, 1.0, 0.3]  # shape and texture are harder to learn than colour
    phrases = sorted(set(itertools.chain(*views)))
    number = {phrase: i for i, phrase in enumerate(phrases)}
    ids = torch.tensor([[number[phrase] for phrase in view] for view in views])  # (view, kind) -> phrase
    tokens = [tokenizer([t.format(p) for p in phrases], padding=True, return_tensors="pt") for t in TEMPLATES]
    # Muon gets a small transformer going in far fewer steps than AdamW; it is for weight matrices only.
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n}
    others = [p for n, p in model.named_parameters() if n not in matrices]
    optimizers = [
        torch.optim.Muon(matrices.values(), MUON_LR, weight_decay=0.05, ns_steps=3),
        torch.optim.AdamW(others, CLIP_LR, weight_decay=0.0),
    ]
    for step, pixels, picked in batches(pictures, kinds, optimizers, CLIP_STEPS, "pretraining the CLIP"):
        used, targets = ids[:, picked].unique(return_inverse=True)
        text = {key: value[used] for key, value in tokens[step // 2 % 2].items()}
        logits = model(pixel_values=pixels, **text).logits_per_image
        loss = 0.0
        for view, target, weight in zip(ids, targets, weights):
            outside = ~torch.isin(used, view)  # each view competes among its own phrases only
            loss = loss + weight * F.cross_entropy(logits.masked_fill(outside, -1e4), target)
        loss.backward()


def backbone_of(clip: CLIPModel) -> Dinov2ForImageClassification:
    """A DINOv2 with the weights of a CLIP's vision tower, but for the layer norm before its first layer."""
    vision = clip.config.vision_config
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")
    config = Dinov2Config(
        **{name: getattr(vision, name) for name in (*same, "image_size", "patch_size")},
        mlp_ratio=vision.intermediate_size // vision.hidden_size,
        id2label=dict(enumerate(KINDS)),
        label2id={kind: i for i, kind in enumerate(KINDS)},
    )
    model, source = Dinov2ForImageClassification(config), clip.vision_model.state_dict()
    own = model.dinov2.state_dict()
    for i in range(config.num_hidden_layers):
        for (here, there), kind in itertools.product(PLACES.items(), ("weight", "bias")):
            own[f"encoder.layer.{i}.{here}.{kind}"] = source[f"encoder.layers.{i}.{there}.{kind}"]
    for kind in ("weight", "bias"):
        own[f"layernorm.{kind}"] = source[f"post_layernorm.{kind}"]
    own["embeddings.cls_token"] = source["embeddings.class_embedding"][None, None]
    own["embeddings.position_embeddings"] = source["embeddings.position_embedding.weight"][None]
    own["embeddings.patch_embeddings.projection.weight"] = source["embeddings.patch_embedding.weight"]
    model.dinov2.load_state_dict(own)
    return model


def pretrain_backbone(model: Dinov2ForImageClassification, pictures: Tensor, kinds: Tensor) -> None:
    """Learn to name the kind of each picture."""
    optimizer = torch.optim.AdamW(model.parameters(), BACKBONE_LR, weight_decay=0.05)
    for _, pixels, picked in batches(pictures, kinds, [optimizer], BACKBONE_STEPS, "pretraining the backbone"):
        F.cross_entropy(model(pixel_values=pixels).logits, picked).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="default: beside this script")
    output = parser.parse_args().output
    torch.set_num_threads(1)  # with more, steps this small wait for each other wherever another program runs
    for name, (styles, count, seed) in SETS.items():
        save_set(styles, count, seed, output / f"{name}.parquet")
    drawn, kinds = draw_set(PRETRAIN_STYLES, PICTURES, 0)
    pictures = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in drawn]))
    kinds = torch.from_numpy(kinds)

    torch.manual_seed(0)
    processor = make_processor()
    clip = make_clip(processor.tokenizer, to_pixels(pictures[:1000]))
    pretrain_clip(clip, processor.tokenizer, pictures, kinds)
    backbone = backbone_of(clip)
    pretrain_backbone(backbone, pictures, kinds)
    clip.half().save_pretrained(output / "clip")
    processor.save_pretrained(output / "clip")
    backbone.half().save_pretrained(output / "dinov2")
    processor.image_processor.save_pretrained(output / "dinov2")

    files = sorted(file for pattern in ("*.parquet", "*/*.*") for file in output.glob(pattern) if file.suffix != ".pyc")
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(output)}\n" for file in files]
    (output / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
