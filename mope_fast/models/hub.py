"""Saves on the Hugging Face Hub, through huggingface_hub."""

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from .checkpoint import DESCRIPTION

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
WEIGHTS, INPUTS = "mope_fast-*.safetensors", "predictor-*"


def local_folder(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return a local folder unchanged, or the cached snapshot of a Hub repository "user/name", updated first.

    Raises:
        FileNotFoundError: neither exists, or the repository can't be downloaded.
        ValueError: a revision of a local folder was requested.
        ImportError: huggingface_hub is missing.
    """
    folder = Path(path)
    if folder.exists() or (revision is None and not REPOSITORY.fullmatch(str(path))):
        if revision is not None:
            raise ValueError(f"{folder} is a local folder, which has no revision {revision!r}: leave revision out")
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ImportError(f"{path} is not a local folder; to look for it on the Hub: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=[DESCRIPTION, WEIGHTS, INPUTS]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        what = str(path) if revision is None else f"{path} at {revision}"
        raise FileNotFoundError(
            f"{what} is not a local folder, and can't be downloaded from the Hub: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error


class PushToHub:
    """A mixin that adds ``push_to_hub`` to classes with ``save_pretrained(folder)``."""

    def push_to_hub(
        self,
        repository: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Trained prompts and head of mope_fast",
    ) -> str:
        """Upload the files of ``save_pretrained`` to the Hugging Face Hub in one commit, through huggingface_hub; without encoders.

        Among several processes only one should call this. Files of an older save in the repository are deleted in the same commit.

        Args:
            repository: "user/name"; it is created if it doesn't exist.
            revision: the branch to commit to; None for main.
            private: whether a new repository is private; None for the user's default.
            token: access token; None for the one stored by ``hf auth login``.
            commit_message: message of the commit.

        Returns:
            The commit's URL.

        Raises:
            ValueError: as for ``save_pretrained``; nothing is uploaded.
            ImportError: huggingface_hub is missing.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError("push_to_hub needs huggingface_hub: pip install huggingface_hub") from error
        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=[WEIGHTS, INPUTS],
            )
        return commit.commit_url
