"""Tiny sets of posts in the exact files of the published ones."""

from pathlib import Path

from PIL import Image

TWEETS = {
    "train.txt": [
        ["910308516510011393", "most # funny quotes : lol ... <url> …", 1],
        ["840006160660983809", "<user> thanks for showing up today . ", 0],
        ["725333760762363905", "it 's \"great\" , isn't it", 1],
        ["725333760762363906", "what irony", 1],
        ["725333760762363907", "an ironically nice day", 0],
    ],
    "valid2.txt": [["915657464401580032", "whew ... emoji_92", 1, 0], ["854678856724340736", "oh , good .", 0, 1]],
    "test2.txt": [["862902619928506372", "no longer", 1, 1], ["892551658487631873", "at suntrust park", 0, 0]],
}
SENTIMENTS = {
    1: ("neutral", "positive", "Fun times! ☀".encode()),
    2: ("positive", "negative", b"never read"),
    3: ("negative", "neutral", b"caf\xe9 \x93closed\x94 \x81\r\n"),
    4: ("neutral", "neutral", b"\xef\xbb\xbf meh \n"),
    5: ("positive", "positive", b""),
    6: ("negative", "positive", b"never read"),
    7: ("negative", "negative", b"no"),
}


def save_image(path: Path, **settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(settings.pop("mode", "RGB"), (40, 30), settings.pop("color", "red")).save(path, **settings)


def make_twitter(folder: Path, tweets=TWEETS, newline="\r\n") -> Path:
    """``tweets``: name of the file -> rows, or lines."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    (folder / "dataset_image").mkdir(exist_ok=True)
    for name, rows in tweets.items():
        lines = [row if isinstance(row, str) else repr(row) for row in rows]
        (folder / "text" / name).write_bytes("".join(line + newline for line in lines).encode("utf-8", "surrogateescape"))
        for row in rows:
            if isinstance(row, list) and row[0].isdigit():
                save_image(folder / "dataset_image" / f"{row[0]}.jpg")
    return folder


def make_mvsa(folder: Path, posts=SENTIMENTS, header="ID\ttext,image", newline="\r\n") -> Path:
    lines = [header, *(f"{post}\t{text},{image}" for post, (text, image, _) in posts.items())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labelResultAll.txt").write_bytes("".join(line + newline for line in lines).encode())
    for post, (_, _, text) in posts.items():
        save_image(folder / "data" / f"{post}.jpg")
        (folder / "data" / f"{post}.txt").write_bytes(text)
    return folder
