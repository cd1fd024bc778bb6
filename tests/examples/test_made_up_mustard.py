"""The made-up set is one in MUStARD's files, and three sides are trained on it without a network."""

import json

import pytest

made_up_mustard = pytest.importorskip("made_up_mustard", reason="needs the packages of the examples extra")
train_recipe = pytest.importorskip("train_recipe", reason="needs the packages of the examples extra")

from mope_fast.data import read_mustard  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "made_up"
    try:
        made_up_mustard.main([str(folder), "--utterances", "48", "--missing", "0.4"])
    except RuntimeError as error:
        pytest.skip(str(error))
    return folder


def test_it_is_read_as_mustard_and_some_lack_a_side(folder):
    splits = read_mustard(folder, split="speaker-independent", missing_media="none", val=6)
    posts = [post for each in splits.values() for post in each]
    assert len(posts) == 48
    assert {post.label for post in posts} == {0, 1}
    assert 5 < sum(post.audio is None for post in posts) + sum(not post.frames for post in posts) < 35
    whole = next(post for post in posts if post.audio is not None and post.frames)
    assert whole.open_audio().shape == (32_000,)
    assert [frame.size for frame in whole.open_frames()] == [(64, 64)] * 3
    with pytest.raises(SystemExit):
        made_up_mustard.main([str(folder)])


@pytest.mark.slow
def test_three_sides_are_trained_by_the_recipe(folder, tmp_path, capsys):
    arguments = ["--split", "speaker-independent", "--missing-media", "none", "--val", "6", "--epochs", "2", "--output", tmp_path]
    models = ["--text-model", "minilm", "--audio-model", "whisper-tiny-en", "--video-model", "dinov2-small", "--image-size", "28"]
    results = train_recipe.main([str(value) for value in ("mustard", folder, *models, *arguments)])
    rows = results["test, without each side"]
    assert [row["without"] for row in rows] == ["nothing", "audio", "video", "all of them"]
    assert {row["replaced_by"] for row in rows[1:]} == {"stand-in"}
    assert "without each side" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == results
