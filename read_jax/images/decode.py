"""Pictures of any kind to RGB pixels, safely: nothing a user supplies may crash or exhaust the process."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from read_jax.errors import ImageError

MAX_PIXELS = 178_956_970
"""Largest picture decoded, in pixels: half a gigabyte of RGB, and where Pillow itself sees an attack."""

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Raster formats only: Pillow also reads formats that run other programs (EPS) or have no signature."""

_T = TypeVar("_T")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: str | os.PathLike[str] | bytes | Image.Image | np.ndarray) -> np.ndarray:
    """Decode a picture to uint8 [h, w, 3] RGB, upright.

    source: a path, the bytes of an image file, a PIL image, or a uint8 array [h, w], [h, w, 1], [h, w, 3]
    or [h, w, 4] (the result may share an array's memory).

    As OpenCV's colour reader, which the original uses: EXIF orientation is applied, alpha is dropped without
    compositing, palettes and grey become RGB, 16-bit samples keep their high byte, CMYK
    JPEGs are taken to hold inverted inks as Adobe writes them. Of an animation the first frame is read.

    Raises `ImageError`, naming the source, when it cannot be read: missing, empty, truncated, not a picture,
    of an unsupported type, or larger than `MAX_PIXELS` (found from the header, before decoding).
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "the PIL image"
        return _from_pil(source, str(name))
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        name = f"the image data ({len(data)} bytes)"
        if not data:
            raise ImageError(f"{name} is empty.")
        return _from_file(io.BytesIO(data), name, _from_pil)
    if isinstance(source, str | os.PathLike):
        return _from_path(source, _from_pil)
    raise ImageError(
        f"cannot read a picture from {type(source).__name__}; give a path, bytes, a PIL image or uint8 array."
    )


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) in pixels of the upright picture, from the file's header, without decoding it.

    Raises `ImageError` as `read_image` does, but for damage behind the header.
    """
    return _from_path(path, _upright_size)


def _from_path(source: str | os.PathLike[str], read: Callable[[Image.Image, str], _T]) -> _T:
    name = os.fsdecode(source)
    if name.startswith(("http://", "https://", "data:")):
        raise ImageError(f"{name[:80]} is an address; download the picture and give its path or bytes.")
    try:
        info = os.stat(name)
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no such file (looked in {Path.cwd()}).") from None
    except (OSError, ValueError) as error:  # no permission, a name with a null character, ...
        raise ImageError(f"{name!r} cannot be opened: {error}.") from None
    if stat.S_ISDIR(info.st_mode):
        raise ImageError(f"{name} is a directory; give the path of one picture in it.")
    if not stat.S_ISREG(info.st_mode):
        raise ImageError(f"{name} is not a regular file.")
    if info.st_size == 0:
        raise ImageError(f"{name} is empty (0 bytes); was it copied or downloaded completely?")
    try:
        file = open(name, "rb")  # noqa: SIM115 - the with statement below must not catch decoding errors
    except OSError as error:
        raise ImageError(f"{name} cannot be opened: {error.strerror or error}.") from None
    with file:
        return _from_file(file, name, read)


def _from_file(file: Any, name: str, read: Callable[[Image.Image, str], _T]) -> _T:
    Image.init()  # registers the decoders; harmless when done already
    formats = [f for f in _FORMATS if f in Image.OPEN]
    try:
        image = Image.open(file, formats=formats)
    except Image.UnidentifiedImageError:
        raise ImageError(
            f"{name} is not a picture of a known format ({', '.join(formats)}), or its header is damaged."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large: {error}") from None
    except Exception as error:  # damaged headers raise nearly anything from Pillow's readers
        raise ImageError(f"{name} is damaged: {_reason(error)}.") from None
    with image:
        return read(image, name)


def _upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    _check_size(image.width, image.height, name)
    # Pillow gives a TIFF's size upright already
    sideways = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if sideways else (image.height, image.width)


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    _check_size(image.width, image.height, name)
    try:
        image.load()
        orientation = _orientation(image)
        array = _to_rgb(image, name)
    except ImageError:
        raise
    except Exception as error:  # damaged data raises nearly anything from Pillow's readers
        raise ImageError(
            f"{name} cannot be decoded: {_reason(error)}. It is damaged or was not copied completely."
        ) from None
    if orientation in _UPRIGHT:
        array = np.asarray(Image.fromarray(array).transpose(_UPRIGHT[orientation]))
    return np.array(array, np.uint8, order="C")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the picture is good, only its notes are damaged: show it as stored, as OpenCV does
        return 1


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):  # grey with 16 bits; mode I holds them in 32
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ImageError(f"{name} has 32-bit samples beyond 0..65535; convert it to 8 or 16 bits.")
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if mode == "F":
        raise ImageError(f"{name} has floating-point samples, whose range is unknown; convert it to 8 bits.")
    if mode in ("RGBa", "La"):  # alpha multiplied in; undo it before dropping it
        image = image.convert(mode[:-1] + "A")
    if mode == "LAB":
        raise ImageError(f"{name} is a CIE Lab picture; convert it to RGB.")
    return np.asarray(image.convert("RGB"))


def _from_array(array: np.ndarray) -> np.ndarray:
    shape = array.shape
    if array.dtype != np.uint8:
        hint = ""
        if array.dtype == bool or np.issubdtype(array.dtype, np.floating):
            hint = "; scale it to 0..255 and convert: (255 * array).round().astype(np.uint8)"
            if array.dtype != bool and not np.isfinite(array).all():
                hint = "; it also holds NaN or infinite values"
        raise ImageError(f"an image array must be uint8, not {array.dtype}{hint}.")
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        hint = " (channels come last)" if array.ndim == 3 and shape[0] in (1, 3, 4) else ""
        raise ImageError(f"an image array must be [h, w], or [h, w, 1], 3 or 4, not {list(shape)}{hint}.")
    _check_size(shape[1], shape[0], "the image array")
    if array.ndim == 2:
        array = array[..., None]
    array = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3]
    return np.ascontiguousarray(array)


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height}).")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is too large: {width} x {height} pixels, at most {MAX_PIXELS:,} are decoded."
        )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(". :")
