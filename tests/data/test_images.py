"""load_image: pictures of every kind, as a viewer shows them."""

import contextlib
import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from interrupts import interrupt
from PIL import Image, ImageFile, ImageOps

from mope_fast import FusionCollator
from mope_fast.data import Post, StackEach, images, load_image

GREY_16 = np.array([[0, 128, 129, 0x7FFF], [0x8000, 65000, 65406, 65535]], np.uint16)
GREY_8 = np.array([[0, 0, 1, 127], [128, 253, 254, 255]], np.uint8)
"""Times 255 / 65535, rounded."""


def shown(image):
    """(H, W, 3), or (H, W) where the picture is grey."""
    picture = load_image(image)
    assert (type(picture), picture.mode, picture.info) == (Image.Image, "RGB", {})
    array = np.asarray(picture)
    return array[..., 0] if (array == array[..., :1]).all() else array


def png(depth, color_type, row, transparent=None, exif=None):
    """A picture of one row, as bytes."""
    chunks = [(b"tRNS", transparent), (b"eXIf", exif), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    width = len(row) * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2}[color_type])
    chunks.insert(0, (b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, color_type, 0, 0, 0)))
    if color_type == 3:
        chunks.insert(1, (b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])))
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks if d is not None]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(path, image, **settings):
    image.save(path, **settings)
    return path


# grey of more than 8 bits


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "big-endian.tif", "grey.pgm"])
def test_grey_of_16_bits_is_scaled(tmp_path, name):
    path = saved(tmp_path / name, Image.fromarray(GREY_16.astype(">u2") if "big" in name else GREY_16))
    assert np.array_equal(shown(path), GREY_8)
    with Image.open(path) as opened:
        assert np.array_equal(shown(opened), GREY_8)


def test_grey_of_16_bits_in_memory_is_scaled():
    for array in (GREY_16, GREY_16.astype(">u2")):
        assert np.array_equal(shown(Image.fromarray(array)), GREY_8)


def test_the_depth_and_the_white_of_a_tiff_are_the_files(tmp_path):
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 200, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "12.tif").write_bytes(data.ljust(200, b"\0") + bytes([0x80, 0x0F, 0xFF]))  # 0x800, 0xfff
    assert shown(tmp_path / "12.tif").tolist() == [[128, 255]]
    inverted = saved(tmp_path / "inverted.tif", Image.fromarray(GREY_16), tiffinfo={262: 0})
    assert np.array_equal(shown(inverted), 255 - GREY_8)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_known_range_are_refused(tmp_path, mode):
    image = Image.new(mode, (3, 2), 200)
    path = saved(tmp_path / "a.tif", image)
    with pytest.raises(OSError, match=rf"a\.tif \(ValueError: mode {mode} of TIFF has no known value range: scale it to 8 bits"):
        load_image(path)
    with pytest.raises(OSError, match=rf"mode {mode} of an image in memory has no known value range"):
        load_image(image)
    with pytest.raises(OSError, match=r"the image of post 7 can't be read: .*a\.tif"):
        Post("7", "", path, 0).open_image()


# transparency


@pytest.mark.parametrize(("mode", "left", "expected"), [("RGBA", (200, 0, 0, 128), (227, 127, 127)), ("LA", (0, 128), 127)])
@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_what_is_transparent_shows_white(tmp_path, mode, left, expected, ending):
    image = Image.new(mode, (2, 1), (0,) * len(left))
    image.putpixel((0, 0), left)
    picture = shown(saved(tmp_path / f"a.{ending}", image, **({"lossless": True} if ending == "webp" else {})))
    assert picture[0, 0].tolist() == (list(expected) if mode == "RGBA" else expected)
    assert np.all(picture[0, 1] == 255)


def test_transparency_of_every_mode_in_memory():
    for mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        assert np.all(shown(Image.new(mode, (1, 1), 0)) == 255), mode
    half = Image.new("LA", (1, 1), (100, 128)).convert("La")
    assert abs(int(shown(half)[0, 0]) - 177) <= 1
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert shown(palette)[0, 0].tolist() == [40, 50, 60]
    palette.info["transparency"] = 1
    assert np.all(shown(palette) == 255)


@pytest.mark.parametrize(
    ("depth", "color_type", "row", "transparent", "expected"),
    [
        (1, 0, b"\x0f", b"\0\0", [255] * 8),
        (2, 0, b"\x1b", b"\0\2", [0, 85, 255, 255]),
        (4, 0, b"\x01\x2f", b"\0\2", [0, 17, 255, 255]),
        (8, 0, bytes([1, 2, 255]), b"\0\2", [1, 255, 255]),
        (16, 0, struct.pack(">3H", 257, 258, 0x8000), struct.pack(">H", 258), [1, 255, 128]),
        (8, 2, bytes([1, 2, 3, 9, 9, 9]), struct.pack(">3H", 9, 9, 9), [[1, 2, 3], [255] * 3]),
        (16, 2, struct.pack(">6H", 256, 512, 768, 2305, 2305, 2305), struct.pack(">3H", 2305, 2305, 2305), [[1, 2, 3], [255] * 3]),
        (2, 3, b"\x1b", b"\xff\0", [[255, 0, 0], [255] * 3, [0, 0, 255], [9, 9, 9]]),
        (16, 4, struct.pack(">4H", 0, 0xFFFF, 0, 0), None, [0, 255]),
    ],
)
def test_the_transparent_color_of_a_png_counts_in_its_own_depth(tmp_path, depth, color_type, row, transparent, expected):
    path = tmp_path / "a.png"
    path.write_bytes(png(depth, color_type, row, transparent))
    assert shown(path)[0].tolist() == expected
    with Image.open(path) as opened:
        assert shown(opened.copy())[0].tolist() == shown(opened)[0].tolist() == expected


# turned pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_says(tmp_path, orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    # how a camera that was held so stores it: the standard names the side where the first row and column of the picture are
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T, 6: upright.T[::-1],
        7: upright.T[::-1, ::-1], 8: upright.T[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    for ending, settings in (("png", {}), ("tif", {}), ("webp", {"lossless": True})):
        path = saved(tmp_path / f"a.{ending}", Image.fromarray(np.ascontiguousarray(stored)), exif=exif, **settings)
        assert np.array_equal(shown(path), upright), ending
        with Image.open(path) as opened:
            assert np.array_equal(shown(opened), upright), ending
            assert np.array_equal(shown(load_image(opened)), upright), ending
            if ending != "tif":  # where Pillow's own is wrong
                assert np.array_equal(shown(ImageOps.exif_transpose(opened)), upright), ending
    deep = saved(tmp_path / "16.png", Image.fromarray(stored.astype(np.uint16) * 257), exif=exif)
    assert np.array_equal(shown(deep), upright)


@pytest.mark.parametrize("exif", [b"", b"MM", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01a\0\0\0"])
def test_broken_exif_data_turns_nothing(tmp_path, exif):
    path = tmp_path / "a.png"
    path.write_bytes(png(8, 0, bytes([1, 2, 3]), exif=exif))
    assert shown(path).tolist() == [[1, 2, 3]]


# color spaces


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_color_spaces_become_rgb(mode):
    from PIL import ImageCms

    red = Image.new("RGB", (2, 2), (200, 30, 40))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(red, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        image = red.convert(mode)
    assert np.abs(shown(image)[0, 0].astype(int) - (200, 30, 40)).max() <= 3


def test_cmyk_of_a_jpeg(tmp_path):
    """Written inverted, as Adobe does."""
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK"), quality=100)
    assert np.abs(shown(path)[8, 8].astype(int) - (200, 30, 40)).max() <= 2


def test_one_bit_and_palettes(tmp_path):
    assert shown(saved(tmp_path / "1.png", Image.fromarray(np.array([[True, False]])))).tolist() == [[255, 0]]
    colors = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))
    assert np.array_equal(shown(saved(tmp_path / "p.gif", colors.quantize(2))), np.asarray(colors))


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_shown(tmp_path, ending):
    frames = [Image.new("RGB", (4, 4), (value,) * 3) for value in (250, 100, 0)]
    path = saved(tmp_path / f"a.{ending}", frames[0], save_all=True, append_images=frames[1:])
    assert np.abs(shown(path).astype(int) - 250).max() <= 2
    with Image.open(path) as opened:
        opened.seek(1)
        assert np.abs(shown(opened).astype(int) - 100).max() <= 2
        assert opened.tell() == 1


# refused


def test_bombs_are_refused_by_name(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.new("L", (20, 10)))
    for most in (199, 99):  # where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        caught = pytest.warns(Image.DecompressionBombWarning) if most == 199 else contextlib.nullcontext()
        with caught, pytest.raises(OSError, match=r"a\.png \(.*(MAX_IMAGE_PIXELS=199|exceeds limit of 198)"):
            load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert shown(path).shape == (10, 20)
    with Image.open(path) as opened:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
        with pytest.raises(OSError, match=r"a\.png \(ValueError: 20 x 10 pixels are more than PIL\.Image\.MAX_IMAGE_PIXELS=199"):
            load_image(opened)
    assert shown(Image.new("L", (20, 10))).shape == (10, 20)


@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_files_cut_short_are_refused_whatever_pillows_switch_says(tmp_path, monkeypatch, ending, switch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", switch)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    path = saved(tmp_path / f"a.{ending}", noise)
    data = path.read_bytes()
    assert shown(path).shape == (40, 50, 3)
    for kept in (0, 10, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:kept])
        with pytest.raises(OSError, match=rf"a\.{ending} \("):
            load_image(path)
    if ending in ("jpg", "png"):
        with Image.open(path) as opened, pytest.raises(OSError, match=rf"a\.{ending} \("):
            load_image(opened)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is switch


def test_readers_in_several_threads_give_the_switch_back_once(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    first, second = images._cut_files_refused(), images._cut_files_refused()
    first.__enter__()
    thread = threading.Thread(target=second.__enter__)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    second.__exit__(None, None, None)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_an_interrupt_at_any_moment_gives_pillows_switch_back(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = saved(tmp_path / "a.png", Image.new("RGB", (2, 2)))
    event, interrupted = 1, True
    while interrupted:
        interrupted = interrupt(lambda: load_image(path), event) >= event
        load_image(path)
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True, event
        event += 1
    assert event > 30


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>gone</html>")
    for path in (tmp_path / "a.jpg", str(tmp_path)):
        with pytest.raises(OSError, match=rf"{os.path.basename(path)} \("):
            load_image(path)
    with pytest.raises(FileNotFoundError, match=r"the picture .*b\.jpg"):
        load_image(tmp_path / "b.jpg")
    for size in ((0, 3), (3, 0)):
        with pytest.raises(OSError, match=f"the picture has {size[0]} x {size[1]} pixels"):
            load_image(Image.new("RGB", size))
    for other in (np.zeros((3, 3, 3), np.uint8), io.BytesIO(), None):
        with pytest.raises(TypeError, match=f"a path or a PIL image, got {type(other).__name__}"):
            load_image(other)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16", "L"])
def test_an_image_passed_in_stays_as_it_is(mode):
    image = Image.new(mode, (3, 2), 1)
    image.info.update(
        transparency=(0, 0, 0) if mode == "RGB" else 1, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    )
    before = image.mode, image.size, dict(image.info), image.tobytes()
    picture = load_image(image)
    assert picture is not image
    assert picture.size == (2, 3)
    picture.putpixel((0, 0), (7, 7, 7))
    assert before == (image.mode, image.size, dict(image.info), image.tobytes())


# readers


def test_every_reader_sees_the_same_picture(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(GREY_16))
    as_array = StackEach(lambda image: torch.tensor(np.asarray(image))[..., 0])
    collate = FusionCollator(len, as_array)
    collate.sides["main_inputs"] = ("text", lambda texts: torch.ones(len(texts)))
    assert np.array_equal(np.asarray(Post("1", "", path, 0).open_image())[..., 0], GREY_8)
    with Image.open(path) as opened:
        for sample in (Post("1", "", path, 0), {"text": "", "image": opened}):
            assert np.array_equal(collate([sample])["complementary_inputs"][0].numpy(), GREY_8)
