"""Pictures as a viewer shows them: the one way in for every reader."""

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
"""Tags of TIFF, and of EXIF."""
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""Orientation -> ``PIL.Image.Transpose``."""
GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Of PNGs with fewer bits: how far apart Pillow's greys are."""
GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")


CAFFE_MEAN = (103.939, 116.779, 123.68)
"""Of blue, green and red in ImageNet, which Caffe's networks want taken off."""


def hdf5() -> Any:
    """``h5py``; an ImportError that says what to do."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("HDF5 files need h5py: pip install 'mope_fast[data]'") from error
    return h5py


@dataclass(frozen=True, slots=True)
class Hdf5Image:
    """A picture within an HDF5 file, which is opened for each reading: workers of a DataLoader share no handle.

    Attributes:
        dataset: its name in the file; (N, 3, H, W), numbers.
        caffe: whether channels are blue, green, red with :data:`CAFFE_MEAN` taken off; else red, green, blue, 0 to 255.
    """

    file: Path
    dataset: str
    index: int
    caffe: bool

    def open(self) -> "Image.Image":
        """The picture in RGB.

        Raises:
            ImportError: h5py or Pillow is not installed.
            OSError, KeyError, ValueError: it can't be read.
        """
        with hdf5().File(self.file, "r") as file:
            pixels = np.asarray(file[self.dataset][self.index], np.float32)
        if self.caffe:
            pixels = (pixels + np.array(CAFFE_MEAN, np.float32)[:, None, None])[::-1]
        return pillow().fromarray(pixels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    def __str__(self) -> str:
        return f"{self.file}, {self.dataset}[{self.index}]"


def pillow() -> Any:
    """``PIL.Image``; an ImportError that says what to do."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install pillow") from error
    return Image


def load_image(image: "str | os.PathLike[str] | Hdf5Image | Image.Image") -> "Image.Image":
    """Give a picture as a viewer shows it: a new PIL image of mode RGB, 8 bits.

    Grey of 16 bits is scaled by the file's depth. What is transparent shows white. The picture is turned as its EXIF data says.
    Palettes, CMYK and other color spaces are converted as Pillow does it; color profiles are not applied. Of several frames it is
    the first, or the one at which an opened file stands.

    Args:
        image: a path, a place in an HDF5 file, or an image of PIL, which stays as it is. One that you turned yourself must not have
            an EXIF orientation any more: ``PIL.ImageOps.exif_transpose`` turns and removes it.

    Raises:
        ImportError: Pillow is not installed.
        TypeError: it is none of these.
        FileNotFoundError: there is no such file.
        OSError: it can't be shown: a file that is no picture, is cut short (whatever ``PIL.ImageFile.LOAD_TRUNCATED_IMAGES`` says)
            or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``; an image without pixels; numbers without a known range, as in
            modes F and I. The message names file and reason.
    """
    Image = pillow()  # noqa: N806
    if not isinstance(image, (str, os.PathLike, Hdf5Image, Image.Image)):
        raise TypeError(f"a picture must be a path or an image of PIL, got {type(image).__name__}")
    path, frame = image, 0
    try:
        with _cut_files_refused():
            if isinstance(image, Hdf5Image):
                return image.open()
            if isinstance(image, Image.Image):
                if not _would_be_scrambled(image):
                    return _as_shown(image)
                path, frame = image.filename, image.tell()
            # by a file, not by its name: see _would_be_scrambled
            with open(path, "rb") as file, Image.open(file) as opened:
                if frame:
                    opened.seek(frame)
                return _as_shown(opened)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture {image}") from None
    except Exception as error:  # decoders raise whatever they like: SyntaxError, struct.error, DecompressionBombError
        name = (getattr(image, "filename", "") or repr(image)) if isinstance(image, Image.Image) else image
        raise OSError(f"{name} ({type(error).__name__}: {error})") from error


def _would_be_scrambled(image: "Image.Image") -> bool:
    """Pillow maps plain TIFFs that are opened by name, with width and height exchanged where the picture lies on its side."""
    return image.format == "TIFF" and bool(image.tile and image.filename) and image.tag_v2.get(ORIENTATION, 1) > 4


def is_pillow_image(value: object) -> bool:
    """Whether it is an image of PIL; without importing it."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def _as_shown(image: "Image.Image") -> "Image.Image":
    from PIL import Image, ImageFile

    width, height = image.size
    if not width * height:
        raise ValueError(f"it has {width} x {height} pixels")
    # Pillow only warns up to twice as many
    if isinstance(image, ImageFile.ImageFile) and (most := Image.MAX_IMAGE_PIXELS) is not None and width * height > most:
        raise ValueError(
            f"{width} x {height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS={most:.0f}: a small file may claim any number; "
            "raise that limit for pictures that you trust"
        )
    key = _color_key(image)
    image.load()
    if image.mode == "F" or image.format == "FITS" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(
            f"mode {image.mode} of {image.format or 'an image in memory'} has no range that is known: scale it to 8 bits"
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
    # shown again it is not turned again
    shown.info = {}
    return shown


def _color_key(image: "Image.Image") -> Any:
    """The one transparent color of a grey or RGB picture, in numbers of its pixels; told best before it is loaded."""
    key = image.info.get("transparency")
    kind = {"L": int, "RGB": tuple}.get(image.mode)
    if image.format not in ("PNG", None) or kind is None or not isinstance(key, kind):
        return key
    # a PNG has it in the file's depth, and Pillow takes it for one of 8 bits
    depth = image.tile[0][3] if getattr(image, "tile", None) else None
    if image.mode == "RGB":
        return tuple(value >> 8 for value in key) if depth == "RGB;16B" or max(key) > 255 else key
    if depth is None and 0 < key < 16:
        # loaded before, as datasets does, or a copy: fewer bits have fewer greys, none of which is the key itself
        greys = {grey for grey, count in enumerate(image.histogram()) if count}
        depth = next((name for name, step in GREY_STEPS.items() if key * step in greys and not any(g % step for g in greys)), None)
    return key * GREY_STEPS.get(depth, 1)


def _eight_bits(image: "Image.Image", key: Any) -> np.ndarray:
    """uint8 (H, W) of grey with more bits."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    pixels, highest = np.asarray(image).astype(np.uint32), 2 ** tags.get(BITS, (16,))[0] - 1
    grey = ((pixels * 255 + highest // 2) // highest).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero: Pillow turns that round for 8 bits only
        grey = 255 - grey
    if isinstance(key, int):
        grey[pixels == key] = 255
    return grey


def _orientation(image: "Image.Image") -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # viewers show a picture whose EXIF data is broken
        return None


class _Readers(Guarded):
    """Of this process's threads, and what Pillow's switch was before the first of them came."""

    def __init__(self) -> None:
        super().__init__()
        self.now: set[object] = set()
        self.switch = False


_readers = _Readers()


@contextmanager
def _cut_files_refused() -> Iterator[None]:
    """Also where somebody set Pillow's switch that shows what is missing in grey."""
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
