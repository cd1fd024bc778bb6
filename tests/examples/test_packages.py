"""The example's downloads: clear errors, and nothing half done is taken for whole."""

import subprocess
import zipfile
from pathlib import Path

import pytest

packages = pytest.importorskip("packages", reason="needs the packages of the examples extra")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "CACHE", tmp_path)
    packages.package_folder.cache_clear()
    yield tmp_path
    packages.package_folder.cache_clear()


def write_wheel(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "easy_vqa-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("easy_vqa/data/answers.txt", "yes\nno\n")


def destination(command: list[str]) -> Path:
    return Path(command[command.index("--dest") + 1])


def test_a_failed_download_says_what_to_do(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no such package")
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(
        RuntimeError, match=r"could not download easy-vqa==1\.0: no such package\n.*put its wheel \(easy_vqa-1\.0-\*\.whl\)"
    ):
        packages.package_folder("easy-vqa")


def test_a_wheel_at_hand_is_unpacked_without_a_download(cache, monkeypatch):
    write_wheel(cache / "wheels")
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **kwargs: pytest.fail("downloaded"))
    folder = packages.package_folder("easy-vqa")
    assert (folder / "easy_vqa" / "data" / "answers.txt").read_text() == "yes\nno\n"


def test_a_downloaded_wheel_is_kept(cache, monkeypatch):
    def download(command, **kwargs):
        write_wheel(destination(command))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", download)
    assert (packages.package_folder("easy-vqa") / "easy_vqa" / "data" / "answers.txt").is_file()
    assert [path.name for path in (cache / "wheels").iterdir()] == ["easy_vqa-1.0-py3-none-any.whl"]


def test_a_kill_while_downloading_leaves_no_wheel_that_looks_whole(cache, monkeypatch):
    def killed(command, **kwargs):
        (destination(command) / "easy_vqa-1.0-py3-none-any.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packages.subprocess, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        packages.package_folder("easy-vqa")
    assert not list((cache / "wheels").glob("*.whl"))


def test_a_kill_while_unpacking_leaves_no_folder_that_looks_whole(cache, monkeypatch):
    write_wheel(cache / "wheels")

    def killed(self, path):
        Path(path, "easy_vqa").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", killed)
        with pytest.raises(KeyboardInterrupt):
            packages.package_folder("easy-vqa")
    assert (packages.package_folder("easy-vqa") / "easy_vqa" / "data" / "answers.txt").is_file()
