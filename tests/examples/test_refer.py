"""Mosaics name one shape of four, and every method of the example runs on them."""

import json

import pytest
import torch

refer = pytest.importorskip("refer", reason="needs the packages of the examples extra")
refer_data = pytest.importorskip("refer_data", reason="needs the packages of the examples extra")


@pytest.fixture(scope="module")
def data():
    try:
        return refer_data.mosaics(24, 8, 84, seed=0)
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_mask_is_one_of_four_shapes_each_in_its_quarter(data):
    train, test = data
    assert (len(train), len(test)) == (24, 8)
    for mosaic in data:
        assert (mosaic.masks & ~mosaic.foreground).sum() == 0
        for mask, there in zip(mosaic.masks, mosaic.foreground, strict=True):
            quarters = [part for half in there.chunk(2, 0) for part in half.chunk(2, 1)]
            assert all(10 < part.sum() < 42 * 42 // 2 for part in quarters)
            named = [part.sum() > 0 for half in mask.chunk(2, 0) for part in half.chunk(2, 1)]
            assert sum(named) == 1
    assert all(phrase.split()[0] == "the" and phrase.split()[-1] in refer_data.SHAPES for phrase in train.phrases)


def test_the_named_color_is_that_of_the_mask(data):
    """Of red, green and blue things, whose color is the largest of the three."""
    checked = 0
    for mosaic in data:
        for image, mask, phrase in zip(mosaic.images, mosaic.masks, mosaic.phrase.tolist(), strict=True):
            color = mosaic.phrases[phrase].split()[1]
            if color in ("red", "green", "blue"):
                assert image[:, mask].float().mean(1).argmax() == ("red", "green", "blue").index(color)
                checked += 1
    assert checked > 3


def test_the_same_seed_gives_the_same_mosaics_and_tests_are_always_the_same(data):
    again, other = refer_data.mosaics(24, 8, 84, seed=0), refer_data.mosaics(24, 8, 84, seed=1)
    assert torch.equal(again[0].images, data[0].images)
    assert not torch.equal(other[0].images, data[0].images)
    assert torch.equal(other[1].images, data[1].images)


@pytest.mark.slow
def test_every_method_runs(tmp_path, data):
    report = refer.main(["--smoke", "--output", str(tmp_path)])
    assert set(report["results"]) == {*refer.UNTRAINED, *refer.TRAINED}
    assert json.loads((tmp_path / "results.json").read_text())["results"] == report["results"]
    assert (tmp_path / "predictions.png").stat().st_size > 10_000
