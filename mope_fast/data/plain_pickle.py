"""Pickled files read as data: what they say is never called."""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_NUMPY = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")} | {("numpy", "ndarray"), ("numpy", "dtype")}


class PickledArray:
    """Stands where a pickle has an array or a dtype of NumPy: nothing but what that was made of.

    Attributes:
        state: of an array (version, shape, dtype, order, values), the values a list where they are objects, else bytes.
    """

    def __init__(self, *arguments: Any):
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _PlainUnpickler(pickle.Unpickler):
    """Knows containers, texts, numbers, and stand-ins for NumPy's arrays; the name of anything else is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NUMPY:
            return PickledArray
        if (module, name) == ("_codecs", "encode"):  # how older protocols write bytes
            return _latin_1
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only lists, dicts, texts, numbers and arrays are read")


def _latin_1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def load_plain_pickle(file: BinaryIO, encoding: str = "ASCII") -> Any:
    """Read containers, texts and numbers of a pickled file.

    Nothing that the file names is imported or called: a file with anything else in it is refused. ``encoding`` is of the texts that
    Python 2 has written as bytes.

    Raises:
        ValueError: it has something else, or is damaged.
    """
    try:
        return _PlainUnpickler(file, encoding=encoding).load()
    except Exception as error:  # what a damaged stream makes pickle do is anything
        raise ValueError(f"can't be read as plain data ({type(error).__name__}: {error})") from None


def load_pickled_object(path: Path) -> Any:
    """Read what ``numpy.save`` made of one object that is no array, such as a dict, as :func:`load_plain_pickle` does.

    Raises:
        ValueError: it has something else, or is damaged. The message names the file.
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        try:
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
            if shape != () or dtype.kind != "O":
                raise ValueError(f"has {dtype} {shape}, expected one object")
            made = load_plain_pickle(file)
            (value,) = made.state[4]
        except OSError:
            raise
        except Exception as error:  # what a damaged header makes NumPy raise is anything
            raise ValueError(f"{path} {error}") from None
    return value
