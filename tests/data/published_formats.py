"""Tiny sets in the exact files of the published ones that MoPE was measured on, with what is odd about each."""

import csv
import json
import random
from pathlib import Path

import numpy as np
from published_sets import save_image

DISHES = ("apple_pie", "baklava", "cheese_plate")
GENRES = {
    "train": [["Drama"], ["Comedy", "Romance"], ["Drama", "War"], ["News", "Drama"], ["Adult"], ["Horror"]],
    "dev": [["Comedy"], ["Talk-Show"], ["Drama", "Romance"]],
    "test": [["Drama"], ["Reality-TV", "Comedy"], ["Sci-Fi"]],
}
LABELS = ("entailment", "neutral", "contradiction")
WORDS = {0: "_UNK_", 1: "a", 2: "story", 3: "of", 4: "love", 5: "war", 6: "N", 7: "."}


def make_food101(folder: Path, train: int = 8, test: int = 4, pages: bool = True, titles: bool = True) -> Path:
    """``train`` and ``test`` pictures of each dish; the last one of each split is odd."""
    for split, count in {"train": train, "test": test}.items():
        rows = []
        for dish, color in zip(DISHES, ("red", "green", "blue"), strict=True):
            for i in range(count):
                # a number with a dash, as some of cheese_plate have in the published files
                number = f"{i}-{i}" if (dish, i) == ("cheese_plate", count - 1) else str(i if split == "train" else i + train)
                save_image(folder / "images" / split / dish / f"{dish}_{number}.jpg", color=color)
                if pages and not (split == "train" and dish == "baklava" and i == count - 1):
                    page = folder / "texts_txt" / dish / f"{dish}_{number}.txt"
                    page.parent.mkdir(parents=True, exist_ok=True)
                    odd = i == count - 1
                    page.write_bytes(b"Cr\xe8me & {Pie}\r\n\r\n  it's <b>GOOD</b>" if odd else f"The BEST {dish}, #{i}!\n".encode())
                rows.append([f"{dish}_{number}.jpg", f'My "{dish}", a  Recipe - Pinterest', dish])
        if titles:
            (folder / "texts").mkdir(exist_ok=True)
            with open(folder / "texts" / f"{split}_titles.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\r\n").writerows(rows)
    return folder


def make_mm_imdb(folder: Path, genres=GENRES, times: int = 1) -> Path:
    """A movie for each list of genres, ``times`` each; one without a plot, one in Windows-1252."""
    ids, number = {split: [] for split in genres}, 100_000
    for split, movies in genres.items():
        for i, names in enumerate(movies * times):
            number += 1
            movie = f"{number:07}"
            ids[split].append(movie)
            plots = ["short", f"the longest plot of {movie}: café", "middling plot"] if i != len(movies) * times - 1 else [""]
            if split == "test":
                plots = plots[1:2] or ["the only plot"]
            row = {"plot": plots, "genres": names, "title": "T", "year": 1994, "cast": [{"name": "é"}]}
            save_image(folder / "dataset" / f"{movie}.jpeg", format="JPEG", mode="L" if i == 1 else "RGB", color=90)
            data = json.dumps(row, ensure_ascii=False).encode("cp1252" if i == 0 else "utf-8")
            (folder / "dataset" / f"{movie}.json").write_bytes(data)
    (folder / "split.json").write_text(json.dumps(ids))
    return folder


def make_mm_imdb_hdf5(folder: Path, caffe: bool = True, metadata=None) -> Path:
    """The authors' ``multimodal_imdb.hdf5``, in the layout of their make_dataset.py and Fuel: 4 movies, 2 of train."""
    import h5py

    names = ["Drama", "Comedy", "Romance", *sorted(set(_all_genres()) - {"Drama", "Comedy", "Romance"})]
    folder.mkdir(parents=True, exist_ok=True)
    ranges = {"train": (0, 2), "dev": (2, 3), "test": (3, 4)}
    sources = ("features", "genres", "images", "imdb_ids", "sequences", "three_grams", "vgg_features", "word_grams")
    with h5py.File(folder / "multimodal_imdb.hdf5", "w") as file:
        pixels = np.zeros((4, 3, 256, 160), np.float32)
        pixels[:, 0], pixels[:, 2, :, :80] = 10.0, 200.0  # blue a little, the left half red
        if caffe:
            pixels -= np.array([103.939, 116.779, 123.68], np.float32)[:, None, None]
        else:
            pixels = pixels[:, ::-1]
        file.create_dataset("images", data=pixels.astype(np.int32))
        sequences = file.create_dataset("sequences", (4,), dtype=h5py.special_dtype(vlen=np.dtype("int32")))
        for i, words in enumerate([[1, 2, 3, 4, 7], [5, 6], [1, 5], [4]]):
            sequences[i] = words
        genres = np.zeros((4, len(names)), np.int32)
        genres[[0, 0, 1, 2, 3], [0, 2, 1, 0, 1]] = 1
        file.create_dataset("genres", data=genres).attrs["target_names"] = json.dumps(names)
        file.create_dataset("imdb_ids", data=np.array(["0000001", "0000002", "0000003", "0000004"], "S7"))
        kinds = [
            ("split", "S5"), ("source", "S12"), ("start", np.int64), ("stop", np.int64),
            ("indices", h5py.special_dtype(ref=h5py.Reference)), ("available", np.bool_), ("comment", "S1"),
        ]  # fmt: skip
        rows = [(split, source, *bounds, h5py.Reference(), True, ".") for split, bounds in ranges.items() for source in sources]
        file.attrs["split"] = np.array(rows, dtype=np.dtype(kinds))
    lookup = np.zeros((3, 4), np.float32)
    words = {"ix_to_word": WORDS, "word_to_ix": {word: i for i, word in WORDS.items()}, "vocab_size": len(WORDS), "lookup": lookup}
    np.save(folder / "metadata.npy", words if metadata is None else metadata)
    return folder


def _all_genres() -> tuple[str, ...]:
    return (
        "Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery", "Sci-Fi",
        "Fantasy", "Family", "Biography", "War", "History", "Music", "Animation", "Musical", "Western", "Sport", "Short",
        "Film-Noir",
    )  # fmt: skip


def make_snli_ve(folder: Path, train: int = 9, others: int = 4) -> Path:
    """Lines with all fields of SNLI; the last one of each file has no gold label."""
    for split, count in {"train": train, "dev": others, "test": others}.items():
        lines = []
        for i in range(count):
            picture = f"{4705552913 + i // 3}"
            save_image(folder / "Flickr30K" / "flickr30k_images" / f"{picture}.jpg")
            label = "-" if i == count - 1 else LABELS[i % 3]
            row = {
                "Flickr30K_ID": picture, "annotator_labels": [label], "captionID": f"{picture}.jpg#2", "gold_label": label,
                "pairID": f"{picture}.jpg#2r1{label[0]}", "sentence1": "Never read.", "sentence1_binary_parse": "( x )",
                "sentence2": f"Two women hug, {i} — ümlaut.", "sentence2_parse": "(ROOT)",
            }  # fmt: skip
            lines.append(json.dumps(row))
        (folder / f"snli_ve_{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_mustard(folder: Path, utterances: int = 690, frames: int = 10, media: range = range(0)) -> Path:
    """Utterances in the authors' order of shows; sound and frames of those at the places ``media``."""
    shows = ["BBT"] * 280 + ["FRIENDS"] * 54 + ["GOLDENGIRLS"] * 40 + ["FRIENDS"] * 302 + ["SARCASMOHOLICS"] * 14
    shows = shows[:: len(shows) // utterances][:utterances]
    rows = {}
    for i, show in enumerate(shows):
        name = f"{1 + (show == 'FRIENDS')}_{60 + 10 * i}"
        rows[name] = {
            "utterance": f"It's just a privilege to watch your mind at work, {i}.", "speaker": "SHELDON",
            "context": ["I never would have.", "My apologies."], "context_speakers": ["LEONARD", "SHELDON"], "show": show,
            "sarcasm": i % 2 == 0,
        }  # fmt: skip
        if i in media:
            save_sound(folder / "utterances_final" / f"{name}.wav", seconds=0.1 + 0.01 * (i % 5))
            for frame in range(frames):
                save_image(folder / "frames" / "utterances_final" / name / f"{frame + 1:05}.jpg", color=(frame * 20, i % 256, 0))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sarcasm_data.json").write_text(json.dumps(rows, indent=2))
    return folder


def save_sound(path: Path, seconds: float = 0.1, rate: int = 16_000, channels: int = 1, hertz: float = 440.0, **settings) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, np.stack([wave] + [0 * wave] * (channels - 1), axis=1), rate, **settings)


def make_hateful_memes(folder: Path, train: int = 8, others: int = 4, labelled_tests: bool = True) -> Path:
    """All five files; numbers in names of pictures have leading zeros that ids lack."""
    draw = random.Random(0)
    counts = {"train": train, "dev_seen": others, "dev_unseen": others + 1, "test_seen": others, "test_unseen": others + 2}
    for split, count in counts.items():
        lines = []
        for i in range(count):
            number = draw.randrange(1000, 99_999)
            save_image(folder / "img" / f"{number:05}.png", mode="RGBA", color=(0, 200, 0, 255))
            row = {"id": number, "img": f"img/{number:05}.png", "label": i % 2, "text": f"its their character {i}"}
            if split.startswith("test") and not labelled_tests:
                del row["label"]
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder
