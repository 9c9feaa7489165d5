"""Decoding one stored image to RGB."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


def decode_rgb(stored: dict | None) -> Image.Image:
    """Decode an image the way that a viewer shows it.

    EXIF orientation is applied, transparent parts turn white, 16-bit greyscale is scaled to 8 bit, and of an animation
    the first frame is taken.

    Args:
        stored: `bytes` of an image file, or if they are None the `path` to one: what `datasets.Image(decode=False)`
            gives.

    Raises:
        ValueError: if the image is missing, damaged, too large for Pillow, or of a kind that has no known range.
    """
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise ValueError("there is none")
    try:
        with Image.open(stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"])) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("it is empty, damaged, or of a format that Pillow does not know") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{str(error).partition(',')[0]}; scale it down") from error
    except Exception as error:  # of damaged files Pillow's readers raise nearly anything
        raise ValueError(str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow reads a PGM of any depth as mode I, scaled to 16 bits.
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format == "PPM"):
        scaled = np.asarray(image.convert("I")) / 257  # 65535 / 255
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"it is 32-bit greyscale (mode {image.mode}), whose range of values is not known: save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
