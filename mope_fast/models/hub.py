"""Saves on the Hugging Face Hub, through huggingface_hub."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from .checkpoint import DESCRIPTION

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
WEIGHTS, INPUTS = "mope_fast-*.safetensors", "predictor-*"


def local_folder(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return a folder as it is, and for "user/name" the one that huggingface_hub has in its cache, after it looked for a newer one.

    Raises:
        FileNotFoundError: there is neither, or the repository can't be had.
        ValueError: a revision of a folder was asked for.
        ImportError: huggingface_hub is missing.
    """
    folder = Path(path)
    if folder.exists() or (revision is None and not REPOSITORY.fullmatch(str(path))):
        if revision is not None:
            raise ValueError(f"{folder} is a folder here, which has no revision {revision!r}: leave revision out")
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ImportError(f"{path} is no folder here; to look for it on the Hub: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=[DESCRIPTION, WEIGHTS, INPUTS]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        what = str(path) if revision is None else f"{path} at {revision}"
        raise FileNotFoundError(
            f"{what} is no folder here, and can't be had from the Hub: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def upload(
    save: Callable[[str], None],
    repository: str,
    *,
    revision: str | None,
    private: bool | None,
    token: str | None,
    commit_message: str,
) -> str:
    """Upload what ``save`` writes into a folder in one commit, and return the commit's address; older weights go in it."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save(folder)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, commit_message=commit_message, delete_patterns=WEIGHTS
        )
    return commit.commit_url
