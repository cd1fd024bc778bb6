"""Saves on the Hugging Face Hub: read from a local cache of it, and what an upload would send."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from tiny_fusion import close, make_bert, make_dinov2, make_fusion, make_images, make_text

from mope_fast import MoPEFusion, PromptTuned

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of a machine without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache, repository, revision, model):
    """As a download leaves it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(COMMITS[revision])
    model.save_pretrained(folder / "snapshots" / COMMITS[revision])


def test_a_save_of_the_hub_is_read_by_name_and_revision(cache):
    torch.manual_seed(0)
    bert, dinov2 = make_bert(), make_dinov2()
    inputs, expected = (make_text(3), make_images(3)), {}
    for revision in COMMITS:
        model = make_fusion(bert, dinov2)
        put(cache, "user/topic-mope", revision, model)
        expected[revision] = model(*inputs).logits
        model.unwrap()
    for revision, found in ((None, "main"), ("v1", "v1"), (COMMITS["v1"], "v1")):
        model = MoPEFusion.from_pretrained("user/topic-mope", bert, dinov2, revision=revision).double()
        close(model(*inputs).logits, expected[found])
        model.unwrap()
    put(cache, "user/tuned", "main", PromptTuned(bert, 2, 3))
    assert PromptTuned.from_pretrained("user/tuned", make_bert()).num_classes == 3


@pytest.mark.parametrize("name", ["user/nothing", "outputs/adapter"])
def test_what_is_neither_here_nor_there_is_said_once(cache, name):
    with pytest.raises(FileNotFoundError, match=f"{name} is not a local folder, and can't be downloaded from the Hub: "):
        PromptTuned.from_pretrained(name, make_bert())
    with pytest.raises(FileNotFoundError, match="at v9 is not a local folder"):
        PromptTuned.from_pretrained(name, make_bert(), revision="v9")


def test_a_folder_here_has_no_revision(tmp_path):
    PromptTuned(make_bert(), 2, 3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a local folder, which has no revision 'v1'"):
        PromptTuned.from_pretrained(tmp_path, make_bert(), revision="v1")


def test_an_upload_is_one_commit_of_a_whole_save(monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, repository, *, private, exist_ok):
            calls.append((repository, private, exist_ok))
            return SimpleNamespace(repo_id=f"me/{repository}")

        def create_branch(self, repository, *, branch, exist_ok):
            calls.append((repository, branch))

        def upload_folder(self, *, folder_path, **settings):
            calls.append((sorted(path.suffix for path in Path(folder_path).iterdir()), settings))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = PromptTuned(make_bert(), 2, 3)
    assert model.push_to_hub("tuned", private=True, revision="v2", token="secret") == "https://hub/commit"
    token, created, branch, (files, settings) = calls
    assert branch == ("me/tuned", "v2")
    assert (token, created) == (("token", "secret"), ("tuned", True, True))
    assert files == [".json", ".safetensors"]
    assert (settings["repo_id"], settings["revision"]) == ("me/tuned", "v2")
    assert settings["delete_patterns"] == ["mope_fast-*.safetensors", "predictor-*"]
    with torch.no_grad():
        model.head.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.push_to_hub("tuned")
    assert calls[-1] == ("token", None)
