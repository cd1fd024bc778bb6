"""Read pickle files as plain data, without importing or calling anything that they name."""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_NUMPY = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")} | {("numpy", "ndarray"), ("numpy", "dtype")}


class PickledArray:
    """Stands in for a NumPy array or dtype in a pickle and holds only its pickled state.

    Attributes:
        state: for an array (version, shape, dtype, order, values); the values are a list if they are objects, else bytes.
    """

    def __init__(self, *arguments: Any):
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings, numbers, and stand-ins for NumPy arrays; any other name in the pickle is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NUMPY:
            return PickledArray
        if (module, name) == ("_codecs", "encode"):  # older protocols write bytes this way
            return _latin_1
        raise pickle.UnpicklingError(f"it names {module}.{name}, but only lists, dicts, strings, numbers and arrays are read")


def _latin_1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def load_plain_pickle(file: BinaryIO, encoding: str = "ASCII") -> Any:
    """Read a pickle file of containers, strings and numbers.

    Nothing that the file names is imported or called; a file with anything else in it is refused. ``encoding`` applies to strings
    that Python 2 wrote as bytes.

    Raises:
        ValueError: the file contains something else, or is damaged.
    """
    try:
        return _PlainUnpickler(file, encoding=encoding).load()
    except Exception as error:  # a damaged stream can make pickle raise anything
        raise ValueError(f"can't be read as plain data ({type(error).__name__}: {error})") from None


def load_pickled_object(path: Path) -> Any:
    """Read a ``numpy.save`` file of one object that is not an array, such as a dict, in the way of :func:`load_plain_pickle`.

    Raises:
        ValueError: the file contains something else, or is damaged. The message names the file.
        OSError: the file can't be read.
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
        except Exception as error:  # a damaged header can make NumPy raise anything
            raise ValueError(f"{path} {error}") from None
    return value
