"""The example's downloads: clear errors, and nothing half done is taken for whole."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pretrained = pytest.importorskip("pretrained", reason="needs the packages of the examples extra")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "CACHE", tmp_path)
    pretrained.package_folder.cache_clear()
    yield tmp_path
    pretrained.package_folder.cache_clear()


def put_wheel(cache: Path) -> None:
    (cache / "wheels").mkdir()
    with zipfile.ZipFile(cache / "wheels" / "easy_vqa-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("easy_vqa/data/answers.txt", "yes\nno\n")


def test_a_failed_download_says_what_to_do(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no such package")
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(
        RuntimeError, match=r"could not download easy-vqa==1\.0: no such package\n.*put its wheel \(easy_vqa-1\.0-\*\.whl\)"
    ):
        pretrained.package_folder("easy-vqa")


def test_a_wheel_at_hand_is_unpacked_without_a_download(cache, monkeypatch):
    put_wheel(cache)
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *args, **kwargs: pytest.fail("downloaded"))
    folder = pretrained.package_folder("easy-vqa")
    assert (folder / "easy_vqa" / "data" / "answers.txt").read_text() == "yes\nno\n"


def test_a_kill_while_unpacking_leaves_no_folder_that_looks_whole(cache, monkeypatch):
    put_wheel(cache)

    def killed(self, path):
        Path(path, "easy_vqa").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrained.package_folder("easy-vqa")
    assert (pretrained.package_folder("easy-vqa") / "easy_vqa" / "data" / "answers.txt").is_file()
