"""Posts: samples of a text with an image, sound or video frames, and one or several labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .._progress import tracked
from .audio import load_audio
from .images import Hdf5Image, load_image, pillow
from .lines import listed

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Post:
    """A text, the paths of its image, sound and frames, and a label. Files are read only by the ``open_*`` methods.

    Attributes:
        image: path or place of the image; None for a post without one.
        label: class index; or, if a post may have several classes, a tuple with 0 or 1 for each class; None for an unlabelled post.
        audio: path of the sound file; None for a post without sound.
        frames: paths of a video's frames, in order; empty for a post without a video.
    """

    id: str
    text: str
    image: Path | Hdf5Image | None
    label: int | tuple[int, ...] | None
    audio: Path | None = None
    frames: tuple[Path, ...] = ()

    def open_image(self) -> "Image.Image":
        """Open the image as a viewer shows it, in RGB (:func:`load_image`).

        For a post without an image, return a grey picture of 256 x 256 pixels, as in MoPE's released code.

        Raises:
            ImportError: Pillow is not installed; or h5py is not, for an image in an HDF5 file.
            OSError: the file is missing (FileNotFoundError), or can't be shown; the message names it.
        """
        if self.image is None:
            return pillow().new("RGB", (256, 256), (128, 128, 128))
        return self._opened("image", self.image, load_image)

    def open_audio(self) -> "np.ndarray | None":
        """Load the sound, float32 (samples,) at 16 kHz (:func:`load_audio`); None for a post without sound.

        Raises:
            ImportError: soundfile is not installed; or SciPy is not, for a file with another sampling rate.
            OSError: the file is missing (FileNotFoundError), or can't be read; the message names it.
        """
        return None if self.audio is None else self._opened("sound", self.audio, load_audio)

    def open_frames(self) -> "list[Image.Image] | None":
        """Open the frames as a viewer shows them, in RGB (:func:`load_image`); None for a post without frames.

        Raises:
            ImportError: Pillow is not installed.
            OSError: a file is missing (FileNotFoundError), or can't be shown; the message names it.
        """
        return [self._opened("frame", frame, load_image) for frame in self.frames] or None

    def _opened(self, kind: str, place: Path | Hdf5Image, load: Callable[[Any], Any]) -> Any:
        try:
            return load(place)
        except FileNotFoundError:
            raise FileNotFoundError(f"the {kind} of post {self.id} is missing: {place}") from None
        except OSError as error:
            reason = f"{error}; download it again or leave the post out"
            raise OSError(f"the {kind} of post {self.id} can't be read: {reason}") from error.__cause__


@dataclass(frozen=True, repr=False)
class Posts(Sequence[Post]):
    """Posts of one data set, in its order. An integer index gives a :class:`Post`, a slice or an index tensor gives ``Posts``.

    Attributes:
        class_names: names of classes 0, 1, ...
        dropped: the reasons why the reader left samples out -> their ids; empty for a subset made by indexing.

    Raises:
        TypeError: ``class_names`` is a string.
        ValueError: two classes have the same name, a post's label is none of the classes, or labels are mixed: some posts have one
            class and others a tuple or None.
    """

    posts: tuple[Post, ...]
    class_names: tuple[str, ...]
    dropped: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.class_names, str):
            raise TypeError(f"class_names must be a list of names, got {self.class_names!r}")
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"class_names must differ from each other, got {list(self.class_names)}")
        several, classes = self.multi_label, len(self.class_names)
        for post in self.posts:
            if not self.labelled:
                if post.label is not None:
                    raise ValueError(f"post {post.id} has label {post.label!r}, expected None as in post {self.posts[0].id}")
                continue
            if several != isinstance(post.label, tuple):
                kind = "0 or 1 for each class" if several else "one class"
                raise ValueError(f"post {post.id} has label {post.label!r}, expected {kind} as in post {self.posts[0].id}")
            if several and (len(post.label) != classes or not {*post.label} <= {0, 1}):
                raise ValueError(f"post {post.id} has labels {post.label}, expected 0 or 1 for each of {self.class_names}")
            is_class = isinstance(post.label, int) and not isinstance(post.label, bool)
            if not several and not (is_class and 0 <= post.label < classes):
                raise ValueError(f"post {post.id} has label {post.label!r}, expected 0 to {classes - 1} for {self.class_names}")

    def __len__(self) -> int:
        return len(self.posts)

    @overload
    def __getitem__(self, index: int) -> Post: ...
    @overload
    def __getitem__(self, index: slice | Tensor) -> "Posts": ...
    def __getitem__(self, index: int | slice | Tensor) -> "Post | Posts":
        if isinstance(index, slice):
            return Posts(self.posts[index], self.class_names)
        if isinstance(index, Tensor) and index.dim():
            chosen = torch.arange(len(self))[index.cpu()].tolist()
            return Posts(tuple(self.posts[i] for i in chosen), self.class_names)
        return self.posts[index]

    @property
    def labelled(self) -> bool:
        """True if the posts have labels; either all have one, or none has."""
        return not self.posts or self.posts[0].label is not None

    @property
    def multi_label(self) -> bool:
        """True if a post may have several classes, or none."""
        return bool(self.posts) and isinstance(self.posts[0].label, tuple)

    @cached_property
    def labels(self) -> Tensor:
        """int64 class indices (N,), or 0 and 1 (N, classes) if a post may have several; ValueError if posts have no labels."""
        if not self.labelled:
            raise ValueError("these posts have no labels (labelled is False): use them for prediction, not training or evaluation")
        return torch.tensor([post.label for post in self.posts], dtype=torch.int64)

    @cached_property
    def texts(self) -> list[str]:
        """The texts of all posts, in order."""
        return [post.text for post in self.posts]

    def check_images(self, *, progress: bool = True) -> None:
        """Open every image once.

        Args:
            progress: show a progress bar.

        Raises:
            ImportError: Pillow is not installed.
            OSError: some images can't be read; the message lists the first ten and the number of all.
        """
        problems = []
        for post in tracked(self.posts, "checking images", "image", shown=progress):
            try:
                post.open_image()
            except OSError as error:
                problems.append(str(error))
        if problems:
            raise OSError(f"{len(problems)} of {len(self)} images can't be read:\n{listed(problems)}")

    def __repr__(self) -> str:
        classes = "no labels"
        if self.labelled:
            labels, count = self.labels, len(self.class_names)
            counts = (labels.sum(0) if self.multi_label else torch.bincount(labels, minlength=count)).tolist()
            classes = ", ".join(f"{name}: {count}" for name, count in zip(self.class_names, counts, strict=True))
        dropped = "".join(f"; dropped, {reason}: {len(ids)}" for reason, ids in self.dropped.items())
        return f"Posts({len(self)}; {classes}{dropped})"
