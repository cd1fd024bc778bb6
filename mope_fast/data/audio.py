"""Load sound in the format that speech encoders take. Every reader uses this module."""

import math
import os

import numpy as np

RATE = 16_000
"""Sampling rate in Hz that speech encoders were trained with."""


def load_audio(path: str | os.PathLike[str], rate: int = RATE) -> np.ndarray:
    """Read a sound file as one channel of float32, (samples,), at ``rate`` samples a second.

    The formats are those of libsndfile: WAV, FLAC, Ogg, MP3. Channels are averaged. A file with another sampling rate is resampled
    by ``scipy.signal.resample_poly``.

    Raises:
        ImportError: soundfile is not installed; or SciPy is not, which only resampling needs.
        FileNotFoundError: the file does not exist.
        OSError: the file can't be read as sound, has no samples, or has samples that are not finite. The message names the file and
            the reason.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("reading sound needs soundfile: pip install 'mope_fast[data]'") from error
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the sound file {path} does not exist")
    try:
        samples, found = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:  # TypeError: a headerless file needs a format argument
        raise OSError(f"{path} can't be read as sound ({error})") from error
    if not len(samples):
        raise OSError(f"{path} has no samples")
    mono = samples.mean(1)
    if not np.isfinite(mono).all():
        raise OSError(f"{path} has samples that are not finite")
    if found == rate:
        return mono
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ImportError(f"{path} has {found} samples per second: resampling to {rate} needs SciPy, pip install scipy") from error
    divisor = math.gcd(rate, found)
    return np.ascontiguousarray(resample_poly(mono, rate // divisor, found // divisor), dtype=np.float32)
