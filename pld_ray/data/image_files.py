"""Decode image files as 8-bit RGB images, whatever their format and mode, and resize them.

JPEG files are decoded by libjpeg-turbo (simplejpeg) and all others by Pillow; torch resizes. Both
are about twice as fast as Pillow alone, and they release Python's lock, so that threads help.
"""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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
DECODER = "simplejpeg/pillow, torch bicubic"  # what gives the pixels, for what is stored of them
TEXT_BYTES = 2**26  # of comments in a PNG file, which Pillow unpacks; its default refuses 1 MiB

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom


def decode(content: bytes, name: str) -> Pixels:
    """Decode an image as RGB with 8 bits per channel.

    Grey images of 16 bits are scaled from the full range of the type: 65535 becomes 255.

    Args:
        content: The content of the file.
        name: The name of the image for error messages.

    Returns:
        Pixels, uint8 [H, W, 3].

    Raises:
        InputError: It is not an image, it is too large, or its numbers have no known range.
    """
    pillow = _pillow()
    if content[:2] == b"\xff\xd8":
        import simplejpeg

        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(content)
            if height * width <= pillow.MAX_IMAGE_PIXELS:
                return simplejpeg.decode_jpeg(content)
        except ValueError:
            pass  # such as CMYK, or damaged: Pillow reads it, or says what is wrong
    try:
        with pillow.open(io.BytesIO(content)) as image:
            return np.array(_to_rgb(image))  # a copy, since torch wants arrays that it can write
    except pillow.UnidentifiedImageError:
        raise InputError(f"{name}: cannot be read as an image: not an image file") from None
    except (OSError, ValueError, TypeError, SyntaxError, pillow.DecompressionBombError) as error:
        raise InputError(f"{name}: cannot be read as an image: {error}") from None


def resize(image: Pixels, height: int, width: int, box: Box | None = None) -> Pixels:
    """Resize a part of an image: bicubic, with antialiasing.

    Args:
        image: Pixels, uint8 [H, W, channels].
        height: The new height in pixels.
        width: The new width in pixels.
        box: Left, top, right and bottom of the part in pixels; None for the whole image.

    Returns:
        Pixels, uint8 [height, width, channels].
    """
    import torch  # imported here, because a plan needs this module but must not load torch
    from torch.nn.functional import interpolate

    left, top, right, bottom = box or (0, 0, image.shape[1], image.shape[0])
    part = image[top:bottom, left:right]
    if part.shape[:2] == (height, width):
        return part
    planes = torch.from_numpy(part).permute(2, 0, 1)[None]
    found = interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return found[0].permute(1, 2, 0).numpy()


def _to_rgb(image: Image) -> Image:
    if image.mode == "F" or image.mode.startswith("I"):
        numbers = np.asarray(image)
        # Of the files in Pillow's mode of 32 bits, only PGM and PNG have 16 bits.
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):
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
