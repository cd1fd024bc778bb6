"""Saves on the Hugging Face Hub, through huggingface_hub."""

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from .checkpoint import DESCRIPTION

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
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
            f"{what} is no folder here, and can't be had from the Hub: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


class PushToHub:
    """Gives whatever has ``save_pretrained(folder)`` a ``push_to_hub``."""

    def push_to_hub(
        self,
        repository: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Trained prompts and head of mope_fast",
    ) -> str:
        """Upload what ``save_pretrained`` writes to the Hugging Face Hub, in one commit, through huggingface_hub; not the encoders.

        Of several processes one calls this. What an older save left in the repository goes in the same commit.

        Args:
            repository: "user/name"; it is made where it isn't there.
            revision: the branch to commit to; None for main.
            private: of a new repository; None for the user's default.
            token: None for the one that ``hf auth login`` has stored.
            commit_message: of the commit.

        Returns:
            The commit's address.

        Raises:
            ValueError: as of ``save_pretrained``; nothing is uploaded.
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
