"""Open image files as 8-bit RGB images, whatever their format and mode."""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pld_ray.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

# Endings of the files that are read, and of images that Pillow cannot open everywhere. Files with
# other endings are not images.
READ = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
NOT_READ = {
    *(".heic", ".heif", ".avif", ".gif", ".jfif", ".jp2", ".jxl", ".svg", ".psd", ".exr", ".hdr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".dcm", ".npy"),
}
TEXT_BYTES = 2**26  # of comments in a PNG file, which Pillow unpacks; its default refuses 1 MiB


def open_rgb(content: bytes, name: str) -> Image:
    """Open an image as RGB with 8 bits per channel.

    Grey images of 16 bits are scaled from the full range of the type: 65535 becomes 255.

    Args:
        content: The content of the file.
        name: The name of the image for error messages.

    Raises:
        InputError: It is not an image, it is too large, or its numbers have no known range.
    """
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(content)) as image:
            return _to_rgb(image)
    except pillow.UnidentifiedImageError:
        raise InputError(f"{name}: cannot be read as an image: not an image file") from None
    except (OSError, ValueError, TypeError, SyntaxError, pillow.DecompressionBombError) as error:
        raise InputError(f"{name}: cannot be read as an image: {error}") from None


def _to_rgb(image: Image) -> Image:
    if image.mode == "F" or image.mode.startswith("I"):
        numbers = np.asarray(image)
        # Pillow opens some files of 16 bits in its mode of 32 bits.
        if image.mode == "F" or numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError(
                f"its mode {image.mode} has 32 bits per pixel and no known range; expected images "
                "of 8 or 16 bits"
            )
        eight = (numbers.astype(np.uint32) * 255 + 32767) // 65535
        image = _pillow().fromarray(eight.astype(np.uint8))
    return image.convert("RGB")


@cache
def _pillow() -> Any:
    """Return the module PIL.Image; importing it takes a moment, and a plan does not need it."""
    from PIL import Image, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = TEXT_BYTES
    return Image
