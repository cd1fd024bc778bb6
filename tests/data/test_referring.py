"""RefCOCO's files, references with masks, and the folder that they are written to."""

import json
import pickle

import numpy as np
import pytest
from published_sets import save_image

from mope_fast.data import Reference, compare_counts, read_refcoco, read_reference_folder, write_jsonl_folder
from mope_fast.data.__main__ import main

refcoco_files = pytest.importorskip("refcoco_files", reason="needs the data extra")
SIZE, make_refcoco = refcoco_files.SIZE, refcoco_files.make_refcoco


@pytest.mark.parametrize("protocol", [0, 2])
def test_refcoco_is_read_as_published(tmp_path, protocol):
    splits = read_refcoco(make_refcoco(tmp_path, protocol=protocol))
    assert {name: len(each) for name, each in splits.items()} == {"train": 2, "val": 1, "testA": 1, "testB": 1}
    first, second = splits["train"]
    assert (first.id, first.phrases) == ("0", ("the lady 0", "the lady 1"))
    assert first.open_image().size == SIZE[::-1]
    expected = np.zeros(SIZE, bool)
    expected[5:15, 10:20] = True
    assert (first.open_mask() == expected).all()
    compressed = splits["val"][0].open_mask()
    assert second.open_mask().sum() == compressed.sum() == 36
    assert (second.open_mask() == compressed).all()
    both = splits["testA"][0].open_mask()
    assert both[0, 0]
    assert (both & expected == expected).all()
    assert repr(splits["train"]) == "References(2; 4 phrases; dropped, no image: 0)"
    assert compare_counts("refcoco", splits)[0] == "train: 2 samples are here, 42,404 by unc's split"


def test_all_that_is_wrong_is_one_error(tmp_path):
    folder = make_refcoco(tmp_path, ref0={"ann_id": 7}, ref1={"sentences": []}, ref2={"split": "../x"}, ref3={"ref_id": None})
    (tmp_path / "images" / "mscoco" / "images" / "train2014" / f"COCO_train2014_{4:012}.jpg").unlink()
    with pytest.raises(ValueError, match="5 problems") as error:
        read_refcoco(folder)
    for words in (
        "annotation 7 is not in instances.json",
        "must have a string under sent",
        "'../x' is not a name",
        "'ref_id': expected",
        "its image is missing",
    ):
        assert words in str(error.value)
    with pytest.raises(FileNotFoundError, match="is not RefCOCO, which has"):
        read_refcoco(tmp_path)
    with pytest.raises(ValueError, match=r"split_by must be one of \('umd', 'google'\)"):
        read_refcoco(folder, "refcocog", split_by="unc")
    (folder / "instances.json").write_text("[]")
    with pytest.raises(ValueError, match=r"instances\.json is not in COCO's format"):
        read_refcoco(folder)


def test_a_picture_that_is_gone_may_be_left_out(tmp_path):
    folder = make_refcoco(tmp_path)
    (tmp_path / "images" / "mscoco" / "images" / "train2014" / f"COCO_train2014_{1:012}.jpg").unlink()
    train = read_refcoco(folder, missing_images="skip")["train"]
    assert [each.id for each in train] == ["0"]
    assert train.dropped == {"no image": ["1"]}


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    folder = make_refcoco(tmp_path)
    (folder / "refs(unc).p").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(ValueError, match=r"names builtins\.print, but only lists"):
        read_refcoco(folder)


def test_a_written_folder_has_the_same_objects(tmp_path, capsys):
    folder = make_refcoco(tmp_path)
    splits = read_refcoco(folder)
    main(["refcoco", str(folder), "--to", str(tmp_path / "lines")])
    assert "val.jsonl" in capsys.readouterr().out
    again = read_reference_folder(tmp_path / "lines")
    assert set(again) == set(splits)
    for name, each in splits.items():
        for got, expected in zip(again[name], each, strict=True):
            assert (got.id, got.phrases) == (expected.id, expected.phrases)
            assert (got.open_mask() == expected.open_mask()).all()
            assert got.open_image().tobytes() == expected.open_image().tobytes()
    # masks that are pictures already are carried over
    write_jsonl_folder(again, tmp_path / "twice", progress=False)
    assert (read_reference_folder(tmp_path / "twice", ["val"])["val"][0].open_mask() == splits["val"][0].open_mask()).all()
    with pytest.raises(SystemExit):
        main(["refcoco", str(folder), "--check"])


def test_lines_that_can_not_be_meant_are_one_error(tmp_path):
    save_image(tmp_path / "a.png")
    rows = [
        {"id": 1, "text": "a", "img": "a.png", "mask": "a.png"}, {"id": 2, "img": "a.png", "mask": "a.png"},
        {"id": 3, "texts": [], "img": "a.png", "mask": "a.png"}, {"id": 4, "text": "a", "img": "b.png", "mask": "a.png"},
        {"id": 5, "text": "a", "img": "a.png"}, {"id": 6, "text": "a", "img": "../a.png", "mask": "a.png"},
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(ValueError, match="5 problems") as error:
        read_reference_folder(tmp_path)
    for words in (
        "line 2: expected fields id, texts, img and mask",
        "line 3: texts must be",
        "b.png does not exist",
        '"mask": expected a path',
        "line 6",
    ):
        assert words in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"has no file like train\.jsonl"):
        read_reference_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="segmentation of reference 1 can't be read"):
        Reference("1", ("a",), tmp_path / "a.png", [["x"]], SIZE).open_mask()
