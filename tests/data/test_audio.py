"""Sound and frames of posts: what encoders get, and what can't be read."""

import sys

import numpy as np
import pytest
import torch
from published_formats import save_sound
from published_sets import save_image

from mope_fast import FusionCollator
from mope_fast.data import Post, load_audio

pytest.importorskip("soundfile", reason="needs the data extra")


def test_sound_is_mono_float32_at_16_khz(tmp_path):
    save_sound(tmp_path / "1.wav", seconds=0.5)
    plain = load_audio(tmp_path / "1.wav")
    assert (plain.dtype, plain.shape) == (np.float32, (8000,))
    save_sound(tmp_path / "2.flac", seconds=0.5, channels=2)
    np.testing.assert_allclose(load_audio(tmp_path / "2.flac"), plain / 2, atol=1e-4)
    for rate in (44_100, 8_000):
        save_sound(tmp_path / "3.wav", seconds=0.5, rate=rate, hertz=440)
        resampled = load_audio(tmp_path / "3.wav")
        assert (resampled.dtype, len(resampled)) == (np.float32, 8000)
        np.testing.assert_allclose(resampled[500:-500], plain[500:-500], atol=5e-3)


def test_sound_that_cannot_be_read_is_named(tmp_path):
    for name, data in {"text.wav": b"no sound", "empty.wav": b"", "none.raw": b"12"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(OSError, match=f"{name} can't be read as sound"):
            load_audio(tmp_path / name)
    save_sound(tmp_path / "nothing.wav", seconds=0)
    with pytest.raises(OSError, match=r"nothing.wav has no samples"):
        load_audio(tmp_path / "nothing.wav")
    import soundfile

    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    with pytest.raises(OSError, match="not finite"):
        load_audio(tmp_path / "nan.wav")
    with pytest.raises(FileNotFoundError, match=r"the sound of post 7 is missing: .*gone.wav"):
        Post("7", "", None, 0, audio=tmp_path / "gone.wav").open_audio()
    with pytest.raises(OSError, match=r"the sound of post 7 can't be read: .*text.wav .*; download it again or leave the post out"):
        Post("7", "", None, 0, audio=tmp_path / "text.wav").open_audio()


def test_without_soundfile(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"sound needs soundfile: pip install 'mope_fast\[data\]'"):
        load_audio("1.wav")


def test_collator_opens_sound_and_frames_and_a_missing_side_is_none(tmp_path):
    save_sound(tmp_path / "1.wav")
    save_image(tmp_path / "1.jpg")
    whole = Post("1", "a", None, 0, tmp_path / "1.wav", (tmp_path / "1.jpg",) * 2)
    seen = {}

    def note(name):
        def preprocess(values):
            seen[name] = values
            return torch.zeros(len(values), 1)

        return preprocess

    for field in ("audio", "frames"):
        FusionCollator(note("text"), note(field), complementary_field=field)([whole, Post("2", "b", None, 1)])
    assert seen["audio"][0].shape == (1600,)
    assert [frame.size for frame in seen["frames"][0]] == [(40, 30)] * 2
    assert seen["audio"][1] is seen["frames"][1] is None
    with pytest.raises(FileNotFoundError, match=r"the frame of post 3 is missing"):
        Post("3", "", None, 0, frames=(tmp_path / "gone.jpg",)).open_frames()
