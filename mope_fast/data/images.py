"""Load pictures as a viewer shows them. Every reader uses this module."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._locks import Guarded

if TYPE_CHECKING:
    from PIL import Image

BITS, PHOTOMETRIC, ORIENTATION = 258, 262, 274
"""TIFF and EXIF tag numbers."""
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""EXIF orientation -> ``PIL.Image.Transpose``."""
GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Distance between Pillow's grey levels for PNGs with fewer than 8 bits."""
GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")


CAFFE_MEAN = (103.939, 116.779, 123.68)
"""ImageNet means of blue, green and red, which Caffe's networks expect to be subtracted."""


def hdf5() -> Any:
    """Import and return ``h5py``; the ImportError says how to install it."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("HDF5 files need h5py: pip install 'mope_fast[data]'") from error
    return h5py


@dataclass(frozen=True, slots=True)
class Hdf5Image:
    """A picture within an HDF5 file. The file is opened for each read, so that DataLoader workers share no handle.

    Attributes:
        dataset: name in the file of the numeric dataset (N, 3, H, W).
        caffe: True if channels are blue, green, red with :data:`CAFFE_MEAN` subtracted; False for red, green, blue, 0 to 255.
    """

    file: Path
    dataset: str
    index: int
    caffe: bool

    def open(self) -> "Image.Image":
        """Return the picture in RGB.

        Raises:
            ImportError: h5py or Pillow is not installed.
            OSError, KeyError, ValueError: the picture can't be read.
        """
        with hdf5().File(self.file, "r") as file:
            pixels = np.asarray(file[self.dataset][self.index], np.float32)
        if self.caffe:
            pixels = (pixels + np.array(CAFFE_MEAN, np.float32)[:, None, None])[::-1]
        return pillow().fromarray(pixels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    def __str__(self) -> str:
        return f"{self.file}, {self.dataset}[{self.index}]"


def pillow() -> Any:
    """Import and return ``PIL.Image``; the ImportError says how to install it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install pillow") from error
    return Image


def load_image(image: "str | os.PathLike[str] | Hdf5Image | Image.Image") -> "Image.Image":
    """Load a picture as a viewer shows it: a new PIL image of mode RGB, 8 bits.

    16-bit grey is scaled by the file's bit depth. Transparent pixels become white. The picture is rotated by its EXIF orientation.
    Palettes, CMYK and other color spaces are converted as Pillow does it; color profiles are not applied. Of several frames the
    first is loaded, or the current frame of an opened file.

    Args:
        image: a path, a place in an HDF5 file, or a PIL image, which is not modified. An image that you rotated yourself must not
            keep its EXIF orientation: ``PIL.ImageOps.exif_transpose`` rotates and removes it.

    Raises:
        ImportError: Pillow is not installed.
        TypeError: ``image`` has another type.
        FileNotFoundError: the file does not exist.
        OSError: the picture can't be shown. The file is not a picture, is truncated (whatever
            ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` says) or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``; the image has no
            pixels; or its values have no known range, as in modes F and I. The message names the file and the reason.
    """
    Image = pillow()  # noqa: N806
    if not isinstance(image, (str, os.PathLike, Hdf5Image, Image.Image)):
        raise TypeError(f"a picture must be a path or a PIL image, got {type(image).__name__}")
    path, frame = image, 0
    try:
        with _cut_files_refused():
            if isinstance(image, Hdf5Image):
                return image.open()
            if isinstance(image, Image.Image):
                if not _would_be_scrambled(image):
                    return _as_shown(image)
                path, frame = image.filename, image.tell()
            # opened as a file object, not by name, because of _would_be_scrambled
            with open(path, "rb") as file, Image.open(file) as opened:
                if frame:
                    opened.seek(frame)
                return _as_shown(opened)
    except FileNotFoundError:
        raise FileNotFoundError(f"the picture {image} does not exist") from None
    except Exception as error:  # decoders raise many types: SyntaxError, struct.error, DecompressionBombError
        name = (getattr(image, "filename", "") or repr(image)) if isinstance(image, Image.Image) else image
        raise OSError(f"{name} ({type(error).__name__}: {error})") from error


def _would_be_scrambled(image: "Image.Image") -> bool:
    """Return True for a plain TIFF opened by name and lying on its side: Pillow maps it with width and height swapped."""
    return image.format == "TIFF" and bool(image.tile and image.filename) and image.tag_v2.get(ORIENTATION, 1) > 4


def is_pillow_image(value: object) -> bool:
    """Return whether a value is a PIL image, without importing PIL."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def _as_shown(image: "Image.Image") -> "Image.Image":
    from PIL import Image, ImageFile

    width, height = image.size
    if not width * height:
        raise ValueError(f"the picture has {width} x {height} pixels")
    # up to twice the limit Pillow only warns
    if isinstance(image, ImageFile.ImageFile) and (most := Image.MAX_IMAGE_PIXELS) is not None and width * height > most:
        raise ValueError(
            f"{width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS={most:.0f}: a small file may claim any size; "
            "raise that limit for pictures that you trust"
        )
    key = _color_key(image)
    image.load()
    if image.mode == "F" or image.format == "FITS" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(
            f"mode {image.mode} of {image.format or 'an image in memory'} has no known value range: scale it to 8 bits"
        )
    if image.mode == "I" or image.mode in GREY_16:
        shown = Image.fromarray(_eight_bits(image, key)).convert("RGB")
    elif not image.has_transparency_data:
        shown = image.convert("RGB")
    else:
        if key is not None:
            image = image.copy()
            image.info["transparency"] = key
        pixels = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        shown = shown.transpose(Image.Transpose(turn))
    # without the EXIF data a second call does not rotate it again
    shown.info = {}
    return shown


def _color_key(image: "Image.Image") -> Any:
    """Return the transparent color of a grey or RGB picture, in units of its pixel values; most reliable before it is loaded."""
    key = image.info.get("transparency")
    kind = {"L": int, "RGB": tuple}.get(image.mode)
    if image.format not in ("PNG", None) or kind is None or not isinstance(key, kind):
        return key
    # a PNG stores it in the file's bit depth, but Pillow reads it as an 8-bit value
    depth = image.tile[0][3] if getattr(image, "tile", None) else None
    if image.mode == "RGB":
        return tuple(value >> 8 for value in key) if depth == "RGB;16B" or max(key) > 255 else key
    if depth is None and 0 < key < 16:
        # already loaded, as by datasets, or a copy: infer the depth from the grey levels, none of which is the key itself
        greys = {grey for grey, count in enumerate(image.histogram()) if count}
        depth = next((name for name, step in GREY_STEPS.items() if key * step in greys and not any(g % step for g in greys)), None)
    return key * GREY_STEPS.get(depth, 1)


def _eight_bits(image: "Image.Image", key: Any) -> np.ndarray:
    """Scale a grey image with more than 8 bits to uint8 (H, W)."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    pixels, highest = np.asarray(image).astype(np.uint32), 2 ** tags.get(BITS, (16,))[0] - 1
    grey = ((pixels * 255 + highest // 2) // highest).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero: Pillow inverts that for 8 bits only
        grey = 255 - grey
    if isinstance(key, int):
        grey[pixels == key] = 255
    return grey


def _orientation(image: "Image.Image") -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # viewers show a picture even if its EXIF data is broken
        return None


class _Readers(Guarded):
    """The readers active in this process's threads, and the value of Pillow's flag before the first of them started."""

    def __init__(self) -> None:
        super().__init__()
        self.now: set[object] = set()
        self.switch = False


_readers = _Readers()


@contextmanager
def _cut_files_refused() -> Iterator[None]:
    """Make Pillow refuse truncated files, even if its flag that fills missing parts with grey is set."""
    from PIL import ImageFile

    reader = object()
    try:
        with _readers.lock:
            if not _readers.now:
                _readers.switch = ImageFile.LOAD_TRUNCATED_IMAGES
            _readers.now.add(reader)
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        yield
    finally:
        try:
            _give_switch_back(reader)
        except BaseException:  # a Ctrl-C in the middle of it
            _give_switch_back(reader)
            raise


def _give_switch_back(reader: object) -> None:
    from PIL import ImageFile

    with _readers.lock:
        if _readers.now == {reader}:
            ImageFile.LOAD_TRUNCATED_IMAGES = _readers.switch
        _readers.now.discard(reader)
