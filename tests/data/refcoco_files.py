"""Tiny RefCOCO sets in the exact files of REFER, with masks of each kind."""

import json
import pickle

import numpy as np
from published_sets import save_image
from pycocotools import mask as coco

SIZE = (30, 40)
BOX = [[10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]]
SPLITS = ("train", "train", "val", "testA", "testB")


def rle(compressed):
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[2:8, 30:36] = 1
    if compressed:
        found = coco.encode(mask)
        return {"size": list(SIZE), "counts": found["counts"].decode()}
    runs, last, length = [], 0, 0
    for value in mask.flatten(order="F").tolist():
        if value != last:
            runs, last, length = [*runs, length], value, 0
        length += 1
    return {"size": list(SIZE), "counts": [*runs, length]}


def make_refcoco(folder, split_by="unc", protocol=0, **changes):
    """In the folders of REFER: a set, and COCO's images beside it."""
    segmentations = [BOX, rle(False), rle(True), [*BOX, [0.0, 0.0, 4.0, 0.0, 4.0, 4.0, 0.0, 4.0]], BOX]
    refs, images, annotations = [], [], []
    for i, (split, segmentation) in enumerate(zip(SPLITS, segmentations, strict=True)):
        name = f"COCO_train2014_{i:012}.jpg"
        save_image(folder / "images" / "mscoco" / "images" / "train2014" / name)
        images.append({"file_name": name, "height": SIZE[0], "width": SIZE[1], "id": i, "license": 1})
        annotations.append(
            {"segmentation": segmentation, "area": 1.5, "iscrowd": 0, "image_id": i, "category_id": 2, "id": 100 + i}
        )
        sentences = [
            {"tokens": ["the", "lady"], "raw": "The lady—", "sent_id": 2 * i + k, "sent": f"the lady {k}"} for k in range(2)
        ]
        refs.append(
            {
                "sent_ids": [2 * i, 2 * i + 1], "file_name": f"COCO_train2014_{i:012}_{i}.jpg", "ann_id": 100 + i, "ref_id": i,
                "image_id": i, "split": split, "sentences": sentences, "category_id": 2, **changes.get(f"ref{i}", {}),
            }
        )  # fmt: skip
    own = folder / "refcoco"
    own.mkdir(parents=True, exist_ok=True)
    (own / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=protocol))
    (own / "instances.json").write_text(json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": []}))
    return own
