"""A toy image-text world, and a tiny CLIP pretrained on it: all that a CPU-only demo of forgetting needs.

Every picture shows one *shape* (10) in one *colour* (8) with one *texture* (4), drawn in some *style*:

* pretraining styles - `paint` (bright paint with a contour, on paper), `shaded` (soft, dark rims under uneven
  light) and `photo` (cluttered background, noise). Captions name all three factors: "a red striped star".
* fine-tuning style - `sketch`: a shaky grey pencil outline without colour or texture. The task is the shape.
* OOD styles - `chalk` (a grainy line on a board), `blueprint` (a pale thin line over a blue grid) and `neon`
  (a glowing tube in the dark): outlines of the same shapes, in styles that neither training ever shows.

So fine-tuning on `sketch` has something to gain (`sketch-test`), something that may transfer (the OOD tests)
and something to lose: `retention-test` asks for colour, texture *and* shape in the pretraining styles, by
matching each picture with 320 prompts.

    python recipes/toy_world.py [--cache_dir DIR] [--sheet sheet.png]

builds the world once (about a minute on two CPU cores) and prints the base model's zero-shot accuracies.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image, Value
from huggingface_hub import constants
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

SHAPES = ["circle", "triangle", "square", "star", "cross", "heart", "moon", "arrow", "flower", "bolt"]
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (246, 220, 50),
    "green": (50, 160, 70),
    "cyan": (60, 205, 220),
    "blue": (40, 80, 205),
    "purple": (130, 50, 165),
    "pink": (250, 140, 190),
}
TEXTURES = ["plain", "striped", "faded", "hollow"]
KINDS = [f"{colour} {texture} {shape}" for shape in SHAPES for colour in COLOURS for texture in TEXTURES]
PRETRAIN_STYLES = ["paint", "shaded", "photo"]
FINETUNE_STYLE = "sketch"
OOD_STYLES = ["chalk", "blueprint", "neon"]
TEMPLATES = ["a {}", "a photo of a {}"]
SIZE, SCALE = 40, 3  # picture side in pixels; shapes are drawn SCALE times larger, then averaged down

SIZES = {"pretrain": 20000, "train": 600, "test": 500, "retention": 960, "bank": 3200}  # 960: three of each
STEPS, BATCH, MUON_LR, LR = 1100, 96, 0.02, 3e-3


# ---- drawing
def outline(shape: str) -> np.ndarray:
    """The corner points of a shape of about unit radius."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    if shape == "circle":
        return 0.9 * np.stack([np.cos(t), np.sin(t)], 1)
    if shape in ("triangle", "square", "star"):
        n = {"triangle": 3, "square": 4, "star": 10}[shape]
        t = 2 * np.pi * np.arange(n) / n - np.pi / 2 + (np.pi / 4 if shape == "square" else 0)
        r = np.where((np.arange(n) % 2 == 1) & (shape == "star"), 0.42, 1.05)
        return r[:, None] * np.stack([np.cos(t), np.sin(t)], 1)
    if shape == "heart":
        x, y = 16 * np.sin(t) ** 3, -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
        return np.stack([x, y - 2], 1) / 16
    if shape == "moon":
        a = np.linspace(0.3 * np.pi, 1.7 * np.pi, 24)
        outer = np.stack([np.cos(a), np.sin(a)], 1)
        b = np.linspace(1.62 * np.pi, 0.38 * np.pi, 16)
        inner = np.stack([0.35 + 0.78 * np.cos(b), 0.86 * np.sin(b)], 1)
        return np.concatenate([outer, inner]) + [0.2, 0]
    if shape == "flower":
        r = 0.72 + 0.3 * np.cos(5 * t)
        return r[:, None] * np.stack([np.cos(t), np.sin(t)], 1)
    points = {
        "cross": "-3,-9 3,-9 3,-3 9,-3 9,3 3,3 3,9 -3,9 -3,3 -9,3 -9,-3 -3,-3",
        "arrow": "-9,-2.6 1,-2.6 1,-7.5 9.5,0 1,7.5 1,2.6 -9,2.6",
        "bolt": "3,-10 -6,1.4 -1,1.4 -3,10 6,-2.3 1,-2.3",
    }
    return np.array([corner.split(",") for corner in points[shape].split()], dtype=float) / 9


OUTLINES = {shape: outline(shape) for shape in SHAPES}
GRID = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), -1).astype(np.float32)  # pixel centres, as points (x, y)


def place(shape: str, rng: np.random.Generator) -> np.ndarray:
    """The outline at a random place, size, tilt and stretch, in pixels."""
    angle, radius = rng.uniform(-0.2, 0.2), rng.uniform(13, 16)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    slack = SIZE / 2 - radius - 1.5
    points = OUTLINES[shape] * rng.uniform(0.85, 1.1, 2)
    return radius * points @ turn + SIZE / 2 + rng.uniform(-slack, slack, 2)


def fill(points: np.ndarray) -> np.ndarray:
    """Coverage (0..1) of every pixel by the filled shape."""
    canvas = PILImage.new("L", (SIZE * SCALE, SIZE * SCALE))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points * SCALE], fill=255)
    return np.asarray(canvas.reduce(SCALE), dtype=np.float32)[..., None] / 255


def stroke(points: np.ndarray, width: float, shake: float, gaps: float, rng: np.random.Generator) -> np.ndarray:
    """Coverage (0..1) by a hand-drawn outline: `shake` pixels of wobble, a share `gaps` of it left out."""
    ends = np.roll(points, -1, 0)
    pieces = np.maximum(1, np.linalg.norm(ends - points, axis=1) // 4).astype(int)
    path = np.concatenate([a + (b - a) * np.arange(n)[:, None] / n for a, b, n in zip(points, ends, pieces)])
    path = (path + rng.normal(0, shake, path.shape)) * SCALE
    canvas = PILImage.new("L", (SIZE * SCALE, SIZE * SCALE))
    draw = ImageDraw.Draw(canvas)
    for a, b, skip in zip(path, np.roll(path, -1, 0), rng.random(len(path)) < gaps):
        if not skip:
            draw.line([tuple(a), tuple(b)], fill=255, width=round(width * SCALE))
    return np.asarray(canvas.reduce(SCALE), dtype=np.float32)[..., None] / 255


def blobs(rng: np.random.Generator, cells: int, depth: int = 3) -> np.ndarray:
    """Smooth random clutter (0..1)."""
    small = PILImage.fromarray(rng.integers(0, 256, (cells, cells, depth), dtype=np.uint8).squeeze())
    return np.asarray(small.resize((SIZE, SIZE), PILImage.Resampling.BICUBIC), np.float32).reshape(SIZE, SIZE, -1) / 255


def blur(x: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of a one-channel picture (0..1)."""
    soft = PILImage.fromarray((x[..., 0] * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(soft, np.float32)[..., None] / 255


def pattern(texture: str, mask: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How much (0..1) each pixel keeps of the colour; the rest of it is bleached."""
    top, bottom = points[:, 1].min(), points[:, 1].max()
    if texture == "striped":
        keep = 0.5 + 2 * np.sin(GRID[..., 1:] * (2 * np.pi / rng.uniform(7, 8)) + rng.uniform(0, 2 * np.pi))
    elif texture == "faded":
        keep = (bottom - GRID[..., 1:]) / (bottom - top)
    elif texture == "hollow":
        keep = 1 - 6 * (blur(mask, 2) - 0.7)
    else:  # plain
        keep = np.ones_like(mask)
    return np.clip(keep, 0, 1)


def draw(kind: str, style: str, rng: np.random.Generator) -> np.ndarray:
    """One picture, (SIZE, SIZE, 3) uint8. The outline styles ignore the kind's colour and texture."""
    colour, texture, shape = kind.split()
    points = place(shape, rng)
    if style in PRETRAIN_STYLES:
        mask = fill(points)
        keep = pattern(texture, mask, points, rng)
        paint = np.clip(np.array(COLOURS[colour]) / 255 + rng.normal(0, 0.03, 3), 0, 1)
        body = paint * keep + (0.2 * paint + 0.8) * (1 - keep)
    if style == "paint":
        contour, dark = (
            stroke(points, rng.uniform(1, 2), 0.2, 0, rng),
            rng.random() < 0.3,
        )  # dark paper has a pale contour
        picture = (1 - mask) * (rng.uniform(0.75, 1, 3) - 0.7 * dark) + mask * body
        picture = picture * (1 - 0.9 * contour) + contour * (0.85 if dark else 0)
    elif style == "shaded":
        light = 1 + 0.4 * ((GRID / SIZE - 0.5) @ rng.normal(0, 0.5, 2))[..., None]
        soft = blur(mask, 1.7)
        rim = 1 - 0.8 * np.clip(4 * soft * (1 - soft), 0, 1)
        picture = light * rim * (rng.uniform(0.55, 0.95) * (1 - mask) + body * mask)
    elif style == "photo":
        soft = blur(mask, 1)
        picture = (0.35 + 0.45 * blobs(rng, 5)) * (1 - soft) + body * soft
        picture = picture * (1 - 0.7 * blur(stroke(points, 2, 0.1, 0, rng), 0.7))
        picture = picture + rng.normal(0, 0.04, (SIZE, SIZE, 3))
    elif style == "sketch":
        line = np.maximum(stroke(points, 0.7, 0.5, 0.1, rng), stroke(points, 0.7, 0.7, 0.3, rng))
        picture = rng.uniform(0.88, 1) - rng.uniform(0.45, 0.7) * line + rng.normal(0, 0.02, (SIZE, SIZE, 3))
    elif style == "chalk":
        line = stroke(points, 1.7, 0.4, 0.05, rng) * rng.uniform(0.4, 1, (SIZE, SIZE, 1))
        picture = np.array([0.16, 0.28, 0.22]) + 0.15 * blobs(rng, 4, 1) + 0.75 * line
    elif style == "blueprint":
        grid = (((GRID + rng.integers(0, 8, 2)) % 8) < 1).any(-1)[..., None]
        line = np.maximum(stroke(points, 1.4, 0.15, 0, rng), 0.12 * grid)
        picture = np.array([0.1, 0.2, 0.4]) * (1 - line) + np.array([0.85, 0.92, 1]) * line
    else:  # neon
        line, tint = stroke(points, 1.2, 0.2, 0.03, rng), rng.dirichlet([1, 1, 1])
        glow = np.minimum(1, 2.5 * blur(line, 2.2))
        picture = 0.06 + 0.05 * blobs(rng, 6, 1) + tint / tint.max() * glow * 0.8 + 0.6 * line
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def draw_set(styles: list[str], n: int, seed: int, bar: tqdm | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`n` pictures of evenly spread kinds and styles: (n, SIZE, SIZE, 3) and the kinds' numbers."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.arange(n) * len(KINDS) // n if n < len(KINDS) else np.arange(n) % len(KINDS))
    pictures = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for i, kind in enumerate(kinds):
        pictures[i] = draw(KINDS[kind], styles[i % len(styles)], rng)
        if bar is not None:
            bar.update()
    return pictures, kinds


def save_set(pictures: np.ndarray, labels: np.ndarray, names: list[str], path: Path) -> None:
    """Write pictures, class labels and captions as a parquet file that `datasets` decodes by itself."""
    rows = {"image": [], "label": labels.tolist(), "caption": [f"a {names[i]}" for i in labels]}
    for picture in pictures:
        PILImage.fromarray(picture).save(buffer := io.BytesIO(), "PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
    features = Features({"image": Image(), "label": ClassLabel(names=names), "caption": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(path)


# ---- model
def make_processor() -> CLIPProcessor:
    """CLIP's tokenizer and image processor for this world: each of its words becomes one token."""
    words = " ".join(TEMPLATES + KINDS + ["shape"]).replace("{}", "").split()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(words, trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    # all bytes, also as a word's last: a word from outside the world is spelled out, never "unknown"
    tokens = alphabet + [f"{c}</w>" for c in alphabet] + ["".join(m) for m in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({t: i for i, t in enumerate(tokens)}, merges, model_max_length=32)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(images, tokenizer)


def make_model(tokenizer: CLIPTokenizer, pictures: np.ndarray) -> CLIPModel:
    """An untrained CLIP: 8 vision and 2 text layers, thus (8 + 2) x 6 = 60 linear blocks.

    There are only 2 x 2 large patches, because a vision transformer learns a shape in far fewer steps when it
    sees it in few pieces; the patch embedding starts as a whitening of the patches for the same reason.
    """
    width, patch = 96, SIZE // 2
    tower = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 2 * width}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": tokenizer.model_max_length,
    }
    vision = {"num_hidden_layers": 8, "image_size": SIZE, "patch_size": patch}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=tower | text | ids, vision_config=tower | vision, projection_dim=width)
    model = CLIPModel(config)
    pixels = to_pixels(torch.from_numpy(pictures[:1000]))
    patches = F.unfold(pixels, patch, stride=patch).transpose(0, 1).flatten(1)  # (values of a patch, patches)
    variances, axes = torch.linalg.eigh(patches.cov())  # in ascending order
    with torch.no_grad():
        embeddings = model.vision_model.embeddings
        whitening = (axes / (variances + 0.1).sqrt())[:, -width:].T
        embeddings.patch_embedding.weight.copy_(whitening.view_as(embeddings.patch_embedding.weight))
        embeddings.position_embedding.weight.normal_(std=0.7)
    return model


def to_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """What the image processor does to a picture of the right size."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def pretrain(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: np.ndarray, kinds: np.ndarray, bar: tqdm) -> None:
    """Match every picture with its captions - single words and all three - among those of its batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    colour, texture, shape = zip(*(kind.split() for kind in KINDS))
    views = [shape, [f"{c} shape" for c in colour], [f"{t} shape" for t in texture], KINDS]
    weights = [1.0, 0.3, 1.0, 0.3]  # shape and texture are harder to learn than colour
    phrases = sorted(set(itertools.chain(*views)))
    number = {phrase: i for i, phrase in enumerate(phrases)}
    ids = torch.tensor([[number[phrase] for phrase in view] for view in views])  # (view, kind) -> phrase
    tokens = [tokenizer([t.format(p) for p in phrases], padding=True, return_tensors="pt") for t in TEMPLATES]
    pictures, kinds = torch.from_numpy(pictures), torch.from_numpy(kinds)

    # Muon gets a small transformer going in far fewer steps than AdamW; it is for weight matrices only
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n}
    others = [p for n, p in model.named_parameters() if n not in matrices]
    optimizers = [
        torch.optim.Muon(matrices.values(), MUON_LR, weight_decay=0.05, ns_steps=3),
        torch.optim.AdamW(others, LR, weight_decay=0.0),
    ]
    rates = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in rates]
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for group, peak in zip(rates, peaks):  # a short warm-up, then a linear decay
            group["lr"] = peak * min((step + 1) / 30, 1.2 * (1 - step / STEPS), 1)
        pick = torch.randint(len(pictures), (BATCH,), generator=generator)
        pixels = to_pixels(pictures[pick])
        if step % 2:
            pixels = pixels.flip(-1)
        used, targets = ids[:, kinds[pick]].unique(return_inverse=True)
        text = {k: v[used].to(device) for k, v in tokens[step // 2 % 2].items()}
        logits = model(pixel_values=pixels.to(device), **text).logits_per_image
        loss = 0.0
        for view, target, weight in zip(ids, targets.to(device), weights):
            outside = ~torch.isin(used, view).to(device)  # each view competes among its own phrases only
            loss = loss + weight * F.cross_entropy(logits.masked_fill(outside, -1e4), target)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        bar.update(BATCH)
    model.cpu().eval()


@torch.inference_mode()
def zero_shot_accuracy(folder: Path, name: str) -> tuple[float, int]:
    """The stored model's accuracy on one stored set and its class count, as read back by a recipe."""
    processor, model = (
        CLIPProcessor.from_pretrained(folder / "model"),
        CLIPModel.from_pretrained(folder / "model"),
    )
    data = Dataset.from_parquet(str(folder / "data" / f"{name}.parquet"), keep_in_memory=True)
    names = data.features["label"].names
    text = processor(text=[TEMPLATES[0].format(n) for n in names], padding=True, return_tensors="pt")
    pixels = processor(images=data["image"][:], return_tensors="pt")
    predicted = model(**text, **pixels).logits_per_image.argmax(-1)
    return (predicted == torch.tensor(data["label"][:])).float().mean().item(), len(names)


# ---- world
def build(folder: Path) -> None:
    """Draw all sets and pretrain the model into `folder`."""
    (folder / "data").mkdir()
    with tqdm(total=SIZES["pretrain"], desc="drawing the toy world", unit=" pictures") as bar:
        pictures, kinds = draw_set(PRETRAIN_STYLES, SIZES["pretrain"], 0, bar)
    shape_sets = [(FINETUNE_STYLE, "train"), *((style, "test") for style in (FINETUNE_STYLE, *OOD_STYLES))]
    for seed, (style, split) in enumerate(shape_sets, 1):
        drawn, numbers = draw_set([style], SIZES[split], seed)
        labels = numbers // (len(KINDS) // len(SHAPES))
        save_set(drawn, labels, SHAPES, folder / "data" / f"{style}-{split}.parquet")
    drawn, numbers = draw_set(PRETRAIN_STYLES, SIZES["retention"], 99)
    save_set(drawn, numbers, KINDS, folder / "data" / "retention-test.parquet")
    drawn, numbers = draw_set(PRETRAIN_STYLES, SIZES["bank"], 98)
    save_set(drawn, numbers, KINDS, folder / "data" / "retention-bank.parquet")  # what k-NN compares with
    processor = make_processor()
    model = make_model(processor.tokenizer, pictures)
    with tqdm(total=STEPS * BATCH, desc="pretraining the toy CLIP", unit=" pictures") as bar:
        pretrain(model, processor.tokenizer, pictures, kinds, bar)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def ensure_world(cache_dir: str | Path | None = None) -> Path:
    """Return the folder with `model/` (CLIPModel + CLIPProcessor) and `data/<set>-<split>.parquet`.

    Built on first use. The default place carries a hash of this file, so that changed code makes a new world.
    """
    if cache_dir is None:
        fingerprint = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]
        cache_dir = Path(constants.HF_HOME) / "hf_gatelora" / f"toy-world-{fingerprint}"
    folder = Path(cache_dir).expanduser().absolute()
    if (folder / "model").is_dir() and (folder / "data").is_dir():
        return folder
    # build beside the final place, then rename: a half-built world never passes for a whole one
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        with torch.random.fork_rng():  # the caller's random numbers stay as they are
            build(Path(scratch))
        os.chmod(scratch, 0o755)
        try:
            os.rename(scratch, folder)
        except OSError:  # not empty: another process was faster, and its world is the same
            if not (folder / "model").is_dir():
                raise
        else:
            os.mkdir(scratch)  # for the context manager to remove
    return folder


def draw_sheet(path: Path) -> None:
    """A contact sheet: one row per style, one column per shape."""
    styles = [*PRETRAIN_STYLES, FINETUNE_STYLE, *OOD_STYLES]
    looks = [f"{c} {TEXTURES[i % 4]} {s}" for i, (c, s) in enumerate(zip(itertools.cycle(COLOURS), SHAPES))]
    rng = np.random.default_rng(0)
    rows = [np.concatenate([draw(look, style, rng) for look in looks], 1) for style in styles]
    sheet = PILImage.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 3, sheet.height * 3), PILImage.Resampling.NEAREST).save(path)


def main() -> None:
    """Build the world, print the base model's accuracies and, if asked, draw the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache_dir", help="where to keep the world (default: in the Hugging Face cache)")
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet of all styles to this file")
    args = parser.parse_args()
    if args.sheet:
        draw_sheet(args.sheet)
    folder = ensure_world(args.cache_dir)
    print(f"{folder}\n\n{'set':<16}{'classes':>8}{'zero-shot accuracy':>20}")
    for path in sorted((folder / "data").glob("*-test.parquet")):
        accuracy, classes = zero_shot_accuracy(folder, path.stem)
        print(f"{path.stem:<16}{classes:>8}{accuracy:>19.1%}")


if __name__ == "__main__":
    main()
