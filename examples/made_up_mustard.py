"""Write a synthetic set of text, sound and video in MUStARD's file format, for trying three sides without obtaining the real set.

It shows that the parts work together; it says nothing about sarcasm. Each "utterance" is a sentence about a colored shape, two
seconds of a recorded reading, and pictures of Easy-VQA as frames. It is labelled sarcastic if the pictures show something other
than the sentence says, or if the voice drawls (the recording is slowed down). Half of all utterances do neither. So the sentence
alone carries no information, the sentence with pictures or with sound identifies half of the sarcastic ones each, and all three
together identify all. Some utterances lack their sound or their frames. Utterances of the show FRIENDS have pictures and parts of
the recordings that no others have.

    python examples/made_up_mustard.py outputs/made_up_mustard
    python -m mope_fast.data mustard outputs/made_up_mustard --split speaker-independent --missing-media none
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
from easy_vqa_data import easy_vqa
from easy_vqa_jsonl import shown
from files import write_atomically
from packages import package_folder
from PIL import Image

from mope_fast._progress import tracked
from mope_fast.data.audio import RATE, load_audio

SHAPES = ("circle", "rectangle", "triangle")
SAYINGS = ("what a lovely {}", "oh great , another {}", "I have always wanted a {}", "that is a {} , no doubt", "look , a {}")
SPEAKERS = {"BBT": ("SHELDON", "LEONARD", "PENNY"), "FRIENDS": ("ROSS", "RACHEL", "CHANDLER")}
FRAMES, SECONDS, DRAWL = 3, 2.0, 1.5


class Recordings:
    """Cuts two-second pieces from the first two thirds of each recording, or from the rest for held-out utterances."""

    def __init__(self):
        assets = package_folder("moonshine-voice") / "moonshine_voice" / "assets"
        self.sounds = [load_audio(assets / name) for name in ("two_cities.wav", "endgame_nagg_nell.wav")]

    def cut(self, held_out: bool, drawl: bool, random: np.random.Generator) -> np.ndarray:
        sound = self.sounds[random.integers(len(self.sounds))]
        border, length = 2 * len(sound) // 3, int(SECONDS * RATE)
        sound = sound[border:] if held_out else sound[:border]
        taken = int(length / DRAWL) if drawl else length
        start = random.integers(len(sound) - taken)
        part = sound[start : start + taken]
        return np.interp(np.linspace(0, taken - 1, length), np.arange(taken), part) if drawl else part


def write(root: Path, utterances: int, missing: float, seed: int) -> None:
    """Write the whole folder; sarcasm_data.json is written last."""
    random, recordings = np.random.default_rng(seed), Recordings()
    *splits, answers = easy_vqa()
    pictures: list[dict[tuple[str, str], list[Path]]] = [{}, {}]
    for split, by_names in zip(splits, pictures, strict=True):
        for image, names in shown(split, answers).items():
            color, shape = sorted(names, key=SHAPES.__contains__)
            by_names.setdefault((color, shape), []).append(split.paths[image])
    things = sorted(set(pictures[0]) & set(pictures[1]))
    (root / "utterances_final").mkdir(parents=True, exist_ok=True)
    rows = {}
    for i in tracked(range(utterances), "utterances", "utterance", shown=True):
        held_out = bool(random.random() < 0.5)
        show = "FRIENDS" if held_out else "BBT"
        kind = random.choice(["sincere", "contradicted", "drawled"], p=[0.5, 0.25, 0.25])
        said = seen = things[random.integers(len(things))]
        while kind == "contradicted" and seen == said:
            seen = things[random.integers(len(things))]
        lacks = random.choice(["sound", "frames"]) if random.random() < missing else ""
        name = f"{1 + held_out}_{i}"
        if lacks != "sound":
            sound = recordings.cut(held_out, kind == "drawled", random)
            soundfile.write(root / "utterances_final" / f"{name}.wav", sound.astype(np.float32), RATE)
        if lacks != "frames":
            folder = root / "frames" / name
            folder.mkdir(parents=True, exist_ok=True)
            for number, path in enumerate(random.choice(pictures[held_out][seen], FRAMES)):
                Image.open(path).save(folder / f"{number:05}.png")
        rows[name] = {
            "utterance": random.choice(SAYINGS).format(" ".join(said)),
            "speaker": str(random.choice(SPEAKERS[show])),
            "context": [],
            "context_speakers": [],
            "show": show,
            "sarcasm": bool(kind != "sincere"),
        }
    write_atomically(root / "sarcasm_data.json", json.dumps(rows, indent=1))
    sarcastic = sum(row["sarcasm"] for row in rows.values())
    print(f"{root}: {utterances:,} made-up utterances, {sarcastic:,} of them labelled sarcastic")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="created if it doesn't exist")
    parser.add_argument("--utterances", type=int, default=690, help="number of utterances; MUStARD has 690")
    parser.add_argument("--missing", type=float, default=0.1, help="share of utterances that lack their sound or frames")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.utterances < 1 or not 0 <= args.missing <= 1:
        parser.error(f"expected --utterances of at least 1 and --missing in 0..1, got {args.utterances} and {args.missing}")
    if (args.folder / "sarcasm_data.json").exists():
        parser.error(f"{args.folder} already has a set: give another folder")
    write(args.folder, args.utterances, args.missing, args.seed)


if __name__ == "__main__":
    main()
