"""Pictures of every kind and state of repair, through every reader; what they show is computed by numpy from what was written."""

import base64
import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from judge import Contact, Refusal, judge
from PIL import Image, ImageFile

from mope_fast import FusionCollator, VLMoProcessor
from mope_fast.analysis.pictures import show
from mope_fast.data import Post, StackEach, load_image

SIDE = 8


class Picture(NamedTuple):
    """A file's bytes, or an image in memory; what it shows, (H, W, 3), None for nothing; and how much may be rounded."""

    suffix: str
    content: Any
    shows: np.ndarray | None
    rounding: float = 0
    lossy: bool = False


def run(contact: Contact) -> str:
    make = contact.choose((png, png, png, portable, bitmap, gif, tiff, jpeg, webp, in_memory))
    picture = make(contact)
    damage = None if isinstance(picture.content, Image.Image) else contact.choose((None, None, cut, flipped, header, rubbish))
    if damage is not None:
        contact.note(damage.__name__)
        picture = damage(contact, picture)
    path = None
    if isinstance(picture.content, bytes):
        suffix = contact.choose((".png", ".jpg", ".gif", ".tif", "", ".PNG")) if contact.chance(0.2) else picture.suffix
        path = contact.folder / f"picture{suffix}"
        path.write_bytes(picture.content)
    reader = contact.choose(FILE_READERS + IMAGE_READERS if path else IMAGE_READERS)
    contact.note(f"{reader.__name__}, {path and path.name}")
    words = (str(path),) if path else ("image",)

    switch = contact.chance(0.3)

    def right(array):
        if damage in (flipped,):
            expected, rounding = by_pillow(path, switch and reader in IMAGE_READERS), 1
            ImageFile.LOAD_TRUNCATED_IMAGES = switch
        elif picture.shows is None:
            raise AssertionError("it was shown")
        else:
            expected, rounding = picture.shows, picture.rounding
        expected = as_read(reader, expected)
        assert array.shape == expected.shape, f"shape {array.shape}, expected {expected.shape}"
        off = np.abs(array.astype(float) - expected)
        if reader is report and off.max() > rounding:  # as a JPEG
            off = np.abs(array.astype(float) - again_as_jpeg(expected))
        if picture.lossy or reader is report:
            assert off.mean() < 12, f"off by {off.mean():.1f} on average"
        else:
            assert off.max() <= rounding * (3 if reader is processor else 1), (
                f"off by {off.max()}, in {(off > rounding).mean():.0%}"
            )

    def use():
        if reader in FILE_READERS or path is None:
            return reader(path or picture.content)
        with Image.open(path) as opened:
            return reader(opened)

    is_whole = damage is None and picture.shows is not None
    refusal = None if is_whole else Refusal((OSError, ValueError) if reader is report else (OSError,), words)
    ImageFile.LOAD_TRUNCATED_IMAGES = switch
    try:
        if path and reader in IMAGE_READERS and damage is not None:
            try:
                Image.open(path).close()
            except Exception:  # nothing of ours has seen it
                return "refused"
        verdict = judge(use, right, refusal)
        assert switch == ImageFile.LOAD_TRUNCATED_IMAGES, "Pillow's switch is another one"
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    assert np.array_equal(np.asarray(load_image(Image.fromarray(ORDINARY))), ORDINARY)
    return verdict


ORDINARY = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


# readers: an array (H, W, 3) each


def by_path(path: Path) -> np.ndarray:
    return np.asarray(load_image(path))


def by_text(path: Path) -> np.ndarray:
    return np.asarray(load_image(str(path)))


def post(path: Path) -> np.ndarray:
    return np.asarray(Post("7", "a", path, 0).open_image())


def to_array(image: Image.Image) -> torch.Tensor:
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image))


def collated_posts(path: Path) -> np.ndarray:
    collate = FusionCollator(lambda texts: torch.zeros(len(texts), 1), StackEach(to_array))
    return collate([Post("7", "a", path, 0)] * 2)["complementary_inputs"][1].numpy()


def report(picture: Any) -> np.ndarray:
    uri = show(picture if isinstance(picture, Image.Image) else Post("7", "a", picture, 0), "sample 7").picture
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def image(picture: Image.Image) -> np.ndarray:
    return np.asarray(load_image(picture))


def image_twice(picture: Image.Image) -> np.ndarray:
    return np.asarray(load_image(load_image(picture)))


def collated(picture: Image.Image) -> np.ndarray:
    return FusionCollator(None, StackEach(to_array))([{"text": torch.zeros(1), "image": picture}])["complementary_inputs"][
        0
    ].numpy()


def processor(picture: Image.Image) -> np.ndarray:
    """Scaled back to 0..255."""
    pixels = VLMoProcessor(lambda texts, **settings: {}, image_size=SIDE)(images=picture)["pixel_values"][0]
    return ((pixels.double() + 1) * 127.5).round().permute(1, 2, 0).numpy()


FILE_READERS: list[Callable[..., np.ndarray]] = [by_path, by_text, post, collated_posts, report]
IMAGE_READERS: list[Callable[..., np.ndarray]] = [image, image_twice, collated, processor, report]


def as_read(reader: Callable[..., np.ndarray], shows: np.ndarray) -> np.ndarray:
    if reader is not processor:
        return shows.astype(float)
    return np.asarray(Image.fromarray(shows.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(float)


def again_as_jpeg(shows: np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(saved(Image.fromarray(shows.astype(np.uint8)), "JPEG", quality=82)))).astype(float)


# what a picture shows


def rgb(array: np.ndarray) -> np.ndarray:
    return np.repeat(array[..., None], 3, -1) if array.ndim == 2 else array


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None] / 255
    return np.round(rgb(color) * alpha + 255 * (1 - alpha))


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    turns = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }
    return turns.get(orientation, lambda a: a)(stored)


def an_orientation(contact: Contact) -> int:
    return contact.random.randint(0, 9) if contact.chance(0.4) else 1


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


def noise(contact: Contact, *shape: int, highest: int = 255) -> np.ndarray:
    return contact.numbers.integers(0, highest + 1, shape)


def smooth(contact: Contact, channels: int) -> np.ndarray:
    """Colors that change slowly: what a lossy format keeps."""
    height, width = contact.random.randint(8, 40), contact.random.randint(8, 40)
    corners = noise(contact, 2, 2, channels).astype(float)
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    top, bottom = corners[0, 0] * (1 - x) + corners[0, 1] * x, corners[1, 0] * (1 - x) + corners[1, 1] * x
    return np.round(top * (1 - y) + bottom * y).astype(np.uint8)


def size_of(contact: Contact) -> tuple[int, int]:
    return contact.random.randint(1, 20), contact.random.randint(1, 20)


# formats


def png(contact: Contact) -> Picture:
    """Written here: every color type, depth, row filter, transparency, interlacing."""
    color = contact.choose((0, 0, 2, 3, 4, 6))
    depth = contact.choose({0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(color, (8, 16)))
    height, width = size_of(contact)
    channels, highest = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color], (1 << depth) - 1
    values = noise(contact, height, width, channels, highest=highest)
    orientation = an_orientation(contact)
    chunks, rounding = [], 0
    palette = noise(contact, highest + 1, 3) if color == 3 else None
    key = None
    if color == 3:
        chunks.append((b"PLTE", palette.astype(np.uint8).tobytes()))
    if color in (0, 2) and contact.chance(0.5):
        key = values[0, 0] if contact.chance(0.8) else noise(contact, channels, highest=highest)
        chunks.append((b"tRNS", struct.pack(f">{channels}H", *key)))
    alphas = np.full(highest + 1, 255)
    if color == 3 and contact.chance(0.5):
        count = contact.random.randint(1, highest + 1)
        alphas[:count] = noise(contact, count)
        chunks.append((b"tRNS", alphas[:count].astype(np.uint8).tobytes()))
    if orientation != 1:
        chunks.append((b"eXIf", exif_of(orientation).removeprefix(b"Exif\0\0")))
    if contact.chance(0.3):
        chunks.append((b"tEXt", b"Comment\0made by hand"))
    interlaced = contact.chance(0.3)
    grids = ADAM7 if interlaced else [(0, 0, 1, 1)]
    raw = b"".join(png_rows(contact, values[y::dy, x::dx], depth) for y, x, dy, dx in grids)
    data = zlib.compress(raw, contact.random.randint(0, 9))
    cuts = sorted(contact.random.randint(0, len(data)) for _ in range(contact.random.randint(0, 2)))
    chunks += [(b"IDAT", data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    contact.note(f"png {color=} {depth=} {width} x {height} {orientation=} {interlaced=}", [kind.decode() for kind, _ in chunks])
    if color == 3:
        shows, alpha = palette[values[..., 0]], alphas[values[..., 0]]
    else:
        # the grey of 16 bits is scaled, colors of 16 bits lose their lower half
        eight = np.floor(values * 255 / highest + 0.5) if depth != 16 or color == 0 else values >> 8
        rounding = int(depth == 16)
        shows = eight[..., : channels - (color in (4, 6))]
        shows = shows[..., 0] if shows.shape[-1] == 1 else shows
        alpha = eight[..., -1] if color in (4, 6) else np.full((height, width), 255)
        if key is not None:
            alpha = np.where((values == key).all(-1), 0, 255)
    if ((alpha > 0) & (alpha < 255)).any():
        rounding = 1 + rounding
    content = png_file(width, height, depth, color, chunks, interlaced)
    return Picture(".png", content, upright(on_white(shows, alpha), orientation), rounding)


ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def png_rows(contact: Contact, values: np.ndarray, depth: int) -> bytes:
    """Rows of (H, W, channels), each behind a filter of its own."""
    if not values.size:
        return b""
    step = max(1, values.shape[2] * depth // 8)
    previous, rows = None, []
    for row in values.reshape(len(values), -1):
        if depth == 16:
            line = row.astype(">u2").view(np.uint8).astype(int)
        elif depth == 8:
            line = row
        else:
            bits = (row[:, None] >> np.arange(depth - 1, -1, -1)) & 1
            line = np.packbits(bits.astype(np.uint8)).astype(int)
        previous = np.zeros_like(line) if previous is None else previous
        left, corner = (np.concatenate([np.zeros(step, int), each[:-step]])[: len(line)] for each in (line, previous))
        kind = contact.random.randint(0, 4)
        estimate = left + previous - corner
        near = np.stack([abs(estimate - left), abs(estimate - previous), abs(estimate - corner)]).argmin(0)
        paeth = np.choose(near, [left, previous, corner])
        predicted = [0 * line, left, previous, (left + previous) // 2, paeth][kind]
        rows.append(bytes([kind]) + ((line - predicted) % 256).astype(np.uint8).tobytes())
        previous = line
    return b"".join(rows)


def png_file(width, height, depth, color, chunks, interlaced=False) -> bytes:
    first = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (first, *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def portable(contact: Contact) -> Picture:
    """PBM, PGM, PPM: text and binary."""
    kind, (height, width) = contact.random.randint(1, 6), size_of(contact)
    highest = 1 if kind in (1, 4) else contact.choose((255, 255, 65535, 100, 1000))
    values = noise(contact, height, width, 3 if kind in (3, 6) else 1, highest=highest)
    head = f"P{kind}\n# made by hand\n{width} {height}\n" + ("" if kind in (1, 4) else f"{highest}\n")
    if kind <= 3:
        body = "\n".join(" ".join(map(str, row.ravel())) for row in values).encode() + b"\n"
    elif kind == 4:
        body = np.packbits(values[..., 0].astype(np.uint8), axis=1).tobytes()
    else:
        body = values.astype(">u2" if highest > 255 else np.uint8).tobytes()
    contact.note(f"P{kind} {width} x {height}, {highest=}")
    shows = np.floor(values * 255 / highest + 0.5) if highest != 1 else 255 * (1 - values)
    rounding = int(highest not in (1, 255) and not (kind in (2, 5) and highest == 65535))
    return Picture(".ppm", head.encode() + body, rgb(shows[..., 0] if shows.shape[2] == 1 else shows), rounding)


def bitmap(contact: Contact) -> Picture:
    """BMP: 1, 4, 8 and 24 bits, upwards and downwards."""
    bits, (height, width), down = contact.choose((1, 4, 8, 24)), size_of(contact), contact.chance(0.5)
    palette = noise(contact, 1 << bits, 3) if bits <= 8 else np.zeros((0, 3), int)
    if bits == 24:
        shows = noise(contact, height, width, 3)
        lines = shows[..., ::-1].reshape(height, -1).astype(np.uint8)
    else:
        index = noise(contact, height, width, highest=(1 << bits) - 1)
        shows = palette[index]
        spread = (index[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        lines = np.packbits(spread.reshape(height, -1).astype(np.uint8), axis=1)
    rows = [line.tobytes() + bytes(-len(line) % 4) for line in lines]
    body = b"".join(rows if down else rows[::-1])
    table = b"".join(bytes([b, g, r, 0]) for r, g, b in palette)
    offset = 54 + len(table)
    head = b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset)
    head += struct.pack("<IiiHHIIiiII", 40, width, -height if down else height, 1, bits, 0, len(body), 2835, 2835, len(palette), 0)
    contact.note(f"bmp {bits} bits, {width} x {height}, {down=}")
    return Picture(".bmp", head + table + body, shows)


def saved(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def gif(contact: Contact) -> Picture:
    """One frame or several, of which the first is shown."""
    height, width = size_of(contact)
    palette = noise(contact, 256, 3)
    frames, first = [], None
    for _ in range(contact.random.randint(1, 4)):
        index = noise(contact, height, width).astype(np.uint8)
        frame = Image.fromarray(index, "P")
        frame.putpalette(palette.astype(np.uint8).tobytes())
        frames.append(frame)
        first = index if first is None else first
    settings = {"save_all": True, "append_images": frames[1:], "duration": 50, "optimize": False}
    alpha = np.full((height, width), 255)
    if contact.chance(0.5):
        settings["transparency"] = clear = int(first[0, 0])
        alpha = np.where(first == clear, 0, 255)
    contact.note(f"gif of {len(frames)} frames, {width} x {height}, transparent {settings.get('transparency')}")
    return Picture(".gif", saved(frames[0], "GIF", **settings), on_white(palette[first], alpha))


def tiff(contact: Contact) -> Picture:
    mode, (height, width) = contact.choose(("L", "RGB", "RGBA", "I;16", "CMYK", "1", "F", "I")), size_of(contact)
    orientation = min(8, max(1, an_orientation(contact)))  # libtiff writes no other
    settings = {"compression": contact.choose(("raw", "tiff_lzw", "tiff_adobe_deflate"))} if mode not in ("F", "I") else {}
    if orientation != 1:
        settings["tiffinfo"] = {274: orientation}
    picture, shows, rounding = drawn(contact, mode, height, width)
    contact.note(f"tiff {mode} {width} x {height} {orientation=} {settings.get('compression')}")
    return Picture(".tif", saved(picture, "TIFF", **settings), None if shows is None else upright(shows, orientation), rounding)


def jpeg(contact: Contact) -> Picture:
    mode, orientation = contact.choose(("L", "RGB", "RGB", "CMYK")), an_orientation(contact)
    pixels = smooth(contact, len(mode))
    picture = Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)
    settings = {"quality": 95, "progressive": contact.chance(0.3)} | ({"exif": exif_of(orientation)} if orientation != 1 else {})
    contact.note(f"jpeg {mode} {pixels.shape} {orientation=} {settings['progressive']=}")
    shows = rgb(pixels[..., 0]) if mode == "L" else pixels
    if mode == "CMYK":
        shows = np.round((255 - pixels[..., :3].astype(float)) * (255 - pixels[..., 3:].astype(float)) / 255)
    return Picture(".jpg", saved(picture, "JPEG", **settings), upright(shows, orientation), lossy=True)


def webp(contact: Contact) -> Picture:
    mode, (height, width) = contact.choose(("RGB", "RGBA")), size_of(contact)
    orientation = an_orientation(contact)
    picture, shows, rounding = drawn(contact, mode, height, width)
    settings = {"exif": exif_of(orientation)} if orientation != 1 else {}
    contact.note(f"webp {mode} {width} x {height} {orientation=}")
    return Picture(".webp", saved(picture, "WEBP", lossless=True, exact=True, **settings), upright(shows, orientation), rounding)


def in_memory(contact: Contact) -> Picture:
    mode = contact.choose(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "I;16", "I;16B", "F", "I", "empty"))
    height, width = size_of(contact)
    contact.note(f"in memory {mode} {width} x {height}")
    if mode == "empty":
        return Picture("", Image.new("RGB", contact.choose(((0, 3), (3, 0), (0, 0)))), None)
    return Picture("", *drawn(contact, mode, height, width))


def drawn(contact: Contact, mode: str, height: int, width: int) -> tuple[Image.Image, np.ndarray | None, int]:
    """A picture of noise, what it shows, and how much may be rounded."""
    if mode in ("F", "I"):
        values = contact.numbers.normal(size=(height, width)) * 100
        return Image.fromarray(values.astype(np.float32 if mode == "F" else np.int32)), None, 0
    if mode.startswith("I;16"):
        values = noise(contact, height, width, highest=65535)
        return Image.fromarray(values.astype(">u2" if mode == "I;16B" else "<u2")), rgb(np.floor(values * 255 / 65535 + 0.5)), 0
    if mode == "1":
        values = noise(contact, height, width, highest=1).astype(bool)
        return Image.fromarray(values), rgb(values * 255), 0
    if mode in ("P", "PA"):
        palette, index = noise(contact, 256, 3).astype(np.uint8), noise(contact, height, width).astype(np.uint8)
        picture = Image.fromarray(index, "P")
        picture.putpalette(palette.tobytes())
        alpha = np.full((height, width), 255)
        if contact.chance(0.5):
            clear = int(index[0, 0])
            picture.info["transparency"] = clear
            alpha = np.where(index == clear, 0, 255)
        if mode == "PA":
            picture = picture.convert("PA")
        return picture, on_white(palette[index], alpha), 0
    pixels = noise(contact, height, width, len(mode)).astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)
    if mode == "L":
        return picture, rgb(pixels[..., 0]), 0
    if mode == "CMYK":
        return picture, np.round((255 - pixels[..., :3].astype(float)) * (255 - pixels[..., 3:].astype(float)) / 255), 1
    if mode == "LA":
        return picture, on_white(pixels[..., 0], pixels[..., 1]), 1
    return (picture, on_white(pixels[..., :3], pixels[..., 3]), 1) if mode == "RGBA" else (picture, pixels[..., :3], 0)


# damage


def cut(contact: Contact, picture: Picture) -> Picture:
    """Shows what it showed, or is refused."""
    where = contact.random.randrange(len(picture.content))
    contact.note(f"at byte {where} of {len(picture.content)}")
    return picture._replace(content=picture.content[:where])


def flipped(contact: Contact, picture: Picture) -> Picture:
    content = bytearray(picture.content)
    for _ in range(contact.choose((1, 1, 3, 20))):
        content[contact.random.randrange(len(content))] ^= 1 << contact.random.randrange(8)
    return picture._replace(content=bytes(content))


def header(contact: Contact, picture: Picture) -> Picture:
    """Sizes that a small file claims."""
    width, height = contact.choose(((60000, 60000), (1 << 31, 1 << 31), (1 << 20, 4000), (0, 5), (5, 0), (0, 0), (20000, 9000)))
    kind = contact.choose(("png", "ppm", "bmp", "gif"))
    contact.note(f"{kind} of {width} x {height}")
    if kind == "png":
        content = png_file(width, height, 8, 0, [(b"IDAT", zlib.compress(bytes(100)))])
    elif kind == "ppm":
        content = f"P5 {width} {height} 255\n".encode() + bytes(100)
    elif kind == "bmp":
        head = struct.pack("<IIIHHIIIIII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        content = b"BM" + struct.pack("<IHHI", 154, 0, 0, 54) + head + bytes(100)
    else:
        side = struct.pack("<HH", min(width, 65535), min(height, 65535))
        content = b"GIF89a" + side + b"\0\0\0," + bytes(4) + side + b"\0\2\2\x44\1\0;"
    return Picture(f".{kind}", content, None)


def rubbish(contact: Contact, picture: Picture) -> Picture:
    """What downloads leave: nothing, a page, zeros, the right beginning."""
    content = contact.choose(
        (b"", b"<html>404</html>", bytes(200), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"BM")
    )
    contact.note(repr(content[:20]))
    return Picture(picture.suffix, content, None)


def by_pillow(path: Path, opened_leniently: bool) -> np.ndarray:
    """What a damaged file shows: Pillow's own pixels, composed by numpy."""
    ImageFile.LOAD_TRUNCATED_IMAGES = opened_leniently
    with open(path, "rb") as file, Image.open(file) as opened:
        key = opened.info.get("transparency")
        rawmode = opened.tile[0][3] if opened.tile else None
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        opened.load()
        mode, values, orientation = opened.mode, np.asarray(opened).astype(int), 1
        with contextlib.suppress(SyntaxError):  # the EXIF data was what was damaged
            orientation = opened.getexif().get(274, 1)
        palette = np.array(opened.getpalette("RGB") or [0] * 768).reshape(-1, 3) if mode == "P" else None
        whites = opened.format == "TIFF" and opened.tag_v2.get(262) == 0
        alphas = np.full(256, 255)
        if mode == "P" and isinstance(key, bytes):
            alphas[: len(key)] = list(key)
        elif mode == "P" and isinstance(key, int):
            alphas[key] = 0
    if mode == "1":
        shows = on_white(values * 255, np.where(values == key, 0, 255))
    elif mode == "P":
        palette = np.concatenate([palette, np.zeros((256 - len(palette), 3), int)])
        shows = on_white(palette[values], alphas[values])
    elif mode in ("L", "RGB"):
        shows = rgb(values)
        if key is not None:
            key = np.array(key)
            key = key >> 8 if rawmode == "RGB;16B" else key * {"L;2": 85, "L;4": 17}.get(rawmode, 1)
            alpha = np.where((shows == key).all(-1), 0, 255)
            shows = on_white(shows, alpha)
    elif mode in ("LA", "RGBA"):
        shows = on_white(values[..., :-1] if mode == "RGBA" else values[..., 0], values[..., -1])
    elif mode == "CMYK":
        shows = np.round((255 - values[..., :3]) * (255 - values[..., 3:]) / 255)
    elif mode.startswith("I;16") or mode == "I":
        grey = np.floor(values * 255 / 65535 + 0.5)
        if isinstance(key, int):
            grey = np.where(values == key, 255, grey)
        shows = rgb(255 - grey if whites else grey)
    else:
        raise AssertionError(f"no one knows what {mode} shows")
    return upright(shows, orientation)
