"""Pictures of a toy world, in which a model can learn something new and forget what it knew.

Every picture shows one *shape* (10) in one *colour* (8) with one *texture* (4), drawn in some *style*:

* pretraining styles - `paint` (bright paint with a contour, on paper), `shaded` (soft, dark rims under uneven
  light) and `photo` (cluttered background, noise). Captions name all three factors: "a red striped star".
* fine-tuning style - `sketch`: a shaky grey pencil outline without colour or texture. The task is the shape.
* OOD styles - `chalk` (a grainy line on a board), `blueprint` (a pale thin line over a blue grid) and `neon`
  (a glowing tube in the dark): outlines of the same shapes, in styles that neither training ever shows.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

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
SIZE, SCALE = 40, 3  # picture side in pixels; shapes are drawn SCALE times larger, then averaged down
PALETTE = 16  # colours of a picture: four bits a pixel keep the files small


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
    canvas = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points * SCALE], fill=255)
    return np.asarray(canvas.reduce(SCALE), dtype=np.float32)[..., None] / 255


def stroke(points: np.ndarray, width: float, shake: float, gaps: float, rng: np.random.Generator) -> np.ndarray:
    """Coverage (0..1) by a hand-drawn outline: `shake` pixels of wobble, a share `gaps` of it left out."""
    ends = np.roll(points, -1, 0)
    pieces = np.maximum(1, np.linalg.norm(ends - points, axis=1) // 4).astype(int)
    path = np.concatenate([a + (b - a) * np.arange(n)[:, None] / n for a, b, n in zip(points, ends, pieces)])
    path = (path + rng.normal(0, shake, path.shape)) * SCALE
    canvas = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    draw = ImageDraw.Draw(canvas)
    for a, b, skip in zip(path, np.roll(path, -1, 0), rng.random(len(path)) < gaps):
        if not skip:
            draw.line([tuple(a), tuple(b)], fill=255, width=round(width * SCALE))
    return np.asarray(canvas.reduce(SCALE), dtype=np.float32)[..., None] / 255


def blobs(rng: np.random.Generator, cells: int, depth: int = 3) -> np.ndarray:
    """Smooth random clutter (0..1)."""
    small = Image.fromarray(rng.integers(0, 256, (cells, cells, depth), dtype=np.uint8).squeeze())
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32).reshape(SIZE, SIZE, -1) / 255


def blur(x: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of a one-channel picture (0..1)."""
    soft = Image.fromarray((x[..., 0] * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
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


def draw(kind: str, style: str, rng: np.random.Generator) -> Image.Image:
    """One picture with a palette. The outline styles ignore the kind's colour and texture."""
    colour, texture, shape = kind.split()
    points = place(shape, rng)
    if style in PRETRAIN_STYLES:
        mask = fill(points)
        keep = pattern(texture, mask, points, rng)
        paint = np.clip(np.array(COLOURS[colour]) / 255 + rng.normal(0, 0.03, 3), 0, 1)
        body = paint * keep + (0.2 * paint + 0.8) * (1 - keep)
    if style == "paint":
        contour = stroke(points, rng.uniform(1, 2), 0.2, 0, rng)
        dark = rng.random() < 0.3  # dark paper has a pale contour
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
    return Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8)).quantize(PALETTE)


def draw_set(styles: list[str], n: int, seed: int) -> tuple[list[Image.Image], np.ndarray]:
    """`n` pictures of evenly spread kinds and styles, and their kinds as indices into `KINDS`."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.arange(n) * len(KINDS) // n if n < len(KINDS) else np.arange(n) % len(KINDS))
    return [draw(KINDS[kind], styles[i % len(styles)], rng) for i, kind in enumerate(kinds)], kinds
