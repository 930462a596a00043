"""Decoding: every kind of picture to upright RGB, every broken one to an explained error."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from read_jax.errors import ImageError
from read_jax.images import decode
from read_jax.images.decode import image_size, read_image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (5, 7), np.uint8)


def encoded(array: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(out, kind, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nearly nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def test_path_bytes_pil_and_array_give_the_same_pixels(tmp_path):
    path = tmp_path / "a picture, 象.png"
    path.write_bytes(encoded(RGB))
    sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), Image.fromarray(RGB), RGB]
    for source in sources:
        np.testing.assert_array_equal(read_image(source), RGB)


@pytest.mark.parametrize("source", [RGB, RGB[::-1, :, ::-1], Image.fromarray(RGB), encoded(RGB)])
def test_result_is_contiguous_uint8(source):
    out = read_image(source)
    assert out.dtype == np.uint8 and out.flags.c_contiguous


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_keep_every_pixel(kind):
    np.testing.assert_array_equal(read_image(encoded(RGB, kind)), RGB)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_grey_arrays_become_three_equal_channels(shape):
    np.testing.assert_array_equal(read_image(ALPHA.reshape(shape)), np.dstack([ALPHA] * 3))


def test_alpha_of_an_array_is_dropped():
    np.testing.assert_array_equal(read_image(np.dstack([RGB, ALPHA])), RGB)


def test_alpha_is_dropped_without_compositing():
    np.testing.assert_array_equal(read_image(encoded(np.dstack([RGB, ALPHA]))), RGB)


def test_grey_with_alpha_is_grey():
    picture = Image.merge("LA", [Image.fromarray(RGB[..., 0]), Image.fromarray(ALPHA)])
    np.testing.assert_array_equal(read_image(encoded(picture)), np.dstack([RGB[..., 0]] * 3))


@pytest.mark.parametrize("transparency", [None, 3])
def test_palette_pictures_become_rgb(transparency):
    picture = Image.fromarray(RGB).quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(read_image(encoded(picture, **options)), np.asarray(picture.convert("RGB")))


def test_one_bit_pictures_become_black_and_white():
    bits = ALPHA > 127
    np.testing.assert_array_equal(
        read_image(encoded(Image.fromarray(bits))), np.dstack([bits * np.uint8(255)] * 3)
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_the_high_byte(kind):
    deep = (ALPHA.astype(np.uint16) << 8) | 0xFF
    np.testing.assert_array_equal(read_image(encoded(deep, kind)), np.dstack([ALPHA] * 3))


def test_32_bit_grey_in_the_16_bit_range_keeps_the_high_byte():
    picture = Image.fromarray(ALPHA.astype(np.int32) * 256)
    np.testing.assert_array_equal(read_image(picture), np.dstack([ALPHA] * 3))


@pytest.mark.parametrize("value", [-1, 70_000])
def test_32_bit_grey_beyond_16_bits_is_refused(value):
    with pytest.raises(ImageError, match="32-bit"):
        read_image(Image.fromarray(np.full((2, 2), value, np.int32)))


def test_floating_point_pictures_are_refused():
    with pytest.raises(ImageError, match="floating-point"):
        read_image(encoded(np.ones((3, 3), np.float32), "TIFF"))


def cmyk_jpeg(adobe: bool) -> bytes:
    """A plain CMYK picture of one colour: cyan 200, magenta 40, yellow 0, black 30 (ink amounts)."""
    data = encoded(Image.new("CMYK", (16, 16), (200, 40, 0, 30)), "JPEG", quality=100)
    start = data.index(b"\xff\xee")  # the Adobe marker: inks are stored inverted
    length = struct.unpack(">H", data[start + 2 : start + 4])[0]
    return data if adobe else data[:start] + data[start + 2 + length :]


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpegs_are_read_with_adobes_inverted_inks(adobe):
    want = [(255 - ink) * (255 - 30) / 255 for ink in (200, 40, 0)]
    np.testing.assert_allclose(read_image(cmyk_jpeg(adobe))[8, 8], want, atol=3)


TURNED = {
    1: RGB,
    2: RGB[:, ::-1],
    3: RGB[::-1, ::-1],
    4: RGB[::-1],
    5: RGB.transpose(1, 0, 2),
    6: np.rot90(RGB, -1),
    7: RGB[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(RGB),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, kind, exif=exif)
    np.testing.assert_array_equal(read_image(data), TURNED[orientation])
    np.testing.assert_array_equal(read_image(Image.open(io.BytesIO(data))), TURNED[orientation])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_size_from_the_header_is_the_upright_size(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture"
    Image.new("RGB", (30, 20)).save(path, kind, exif=exif)
    assert image_size(path) == read_image(path).shape[:2]


def test_size_is_known_though_the_pixels_are_cut_off(tmp_path):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((60, 40), 50).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-300])
    assert image_size(path) == (40, 60)
    with pytest.raises(ImageError, match=r"cut\.jpg cannot be decoded"):
        read_image(path)


def test_size_of_a_missing_picture_is_an_error(tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg: there is no such file"):
        image_size(tmp_path / "none.jpg")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_hide_a_good_picture():
    data = encoded(RGB, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 20)
    np.testing.assert_array_equal(read_image(data), RGB)


def test_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(data)[0, 0].tolist() == [255, 0, 0]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.jpg: there is no such file"):
        read_image(tmp_path / "nowhere.jpg")


def test_directory_is_named(tmp_path):
    with pytest.raises(ImageError, match="is a directory"):
        read_image(tmp_path)


def test_device_is_not_read():
    with pytest.raises(ImageError, match="not a regular file"):
        read_image("/dev/zero")


def test_address_is_not_downloaded():
    with pytest.raises(ImageError, match="download"):
        read_image("https://example.com/cat.jpg")


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000])
def test_impossible_file_names_are_explained(name):
    with pytest.raises(ImageError, match="cannot be opened"):
        read_image(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"just some words\n" * 10, "not a picture of a known format"),
        (b"<html><body>404</body></html>", "not a picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture of a known format"),
        (encoded(RGB)[:60], "picture.jpg"),
        (encoded(np.tile(RGB, (20, 20, 1)), "JPEG")[:900], "damaged or was not copied completely"),
    ],
)
def test_bad_files_are_named_and_explained(tmp_path, content, message):
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as error:
        read_image(path)
    assert str(path) in str(error.value)


def test_empty_bytes_are_refused():
    with pytest.raises(ImageError, match="empty"):
        read_image(b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(13_378, 13_378), (60_000, 60_000), (2_000_000_000, 1)])
def test_a_bomb_is_refused_from_its_header(tmp_path, size):
    data = png_header(*size)
    path = tmp_path / "bomb.png"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError, match=r"too large|exceeds"):
            read_image(source)


def test_the_limit_holds_for_arrays_and_is_checked_before_loading(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 34)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded before the check"))
    for source in (RGB, encoded(RGB)):
        with pytest.raises(ImageError, match="7 x 5 pixels, at most 34"):
            read_image(source)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 3), np.float32), r"float32.*scale it"),
        (np.full((2, 2, 3), np.nan), "NaN"),
        (np.zeros((2, 2), bool), "bool"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (np.zeros((3, 20, 20), np.uint8), "channels come last"),
        (np.zeros((2, 2, 2), np.uint8), r"not \[2, 2, 2\]"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"not \[1, 2, 2, 3\]"),
        (np.zeros(5, np.uint8), r"not \[5\]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 0), np.uint8), "no pixels"),
    ],
)
def test_unsuitable_arrays_are_explained(array, message):
    with pytest.raises(ImageError, match=message):
        read_image(array)


@pytest.mark.parametrize("source", [None, 3, [[1, 2]], io.BytesIO(b"x")])
def test_other_types_are_refused(source):
    with pytest.raises(ImageError, match="cannot read a picture from"):
        read_image(source)


SEEDS = [
    encoded(np.tile(RGB, (4, 4, 1)), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_damaged_files_give_pixels_or_an_image_error(seed, data):
    spoiled = bytearray(seed[: data.draw(st.integers(1, len(seed)))])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(seed)), st.integers(0, 255)), max_size=6)
    ):
        spoiled[place % len(spoiled)] = value
    try:
        out = read_image(bytes(spoiled))
    except ImageError:
        return
    assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] == 3


def test_pillows_global_settings_are_left_alone(tmp_path: Path):
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    read_image(encoded(RGB))
    with pytest.raises(ImageError):
        read_image(png_header(60_000, 60_000))
    after = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert after == before
