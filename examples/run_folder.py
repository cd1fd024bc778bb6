"""The output folder of a run that may be killed at any moment: its lock and settings, its checkpoints, its adapters."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from files import write_atomically
from task_arguments import is_unused

_CHECKPOINT, _ADAPTER = r"step-\d{8}", r"adapter-epoch-\d+"
_FILE = r"(settings|results|predictions-\w+)\.jsonl?|predictions\.png"
_PART = rf"\.({_CHECKPOINT}|{_ADAPTER}|({_FILE})\.\d+)\.part|\.report\.html\.\w+\.tmp"


class RunFolder:
    """The output folder of a run. Checkpoints are folders ``step-N``, each written under another name and renamed once complete.

    Only the newest checkpoint is kept. Only files and folders with these exact names are ever removed.
    """

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator
        self._lock = FileLock(folder / ".lock")

    def claim(self, settings: dict[str, Any], resume: bool) -> None:
        """Claim the folder for this run.

        Raises:
            SystemExit: another process is using it, or it has files of another program, of a run although ``resume`` is False, or
                of a run with other settings.
        """
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise SystemExit(f"another process is using {self.folder}: wait for it, or give another --output") from None
            self._check(settings, resume)
            write_atomically(self.folder / "settings.json", json.dumps(settings, indent=2))
            for part in self._named(_PART):  # left by a killed process
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        self.accelerator.wait_for_everyone()

    def _check(self, settings: dict[str, Any], resume: bool) -> None:
        file = self.folder / "settings.json"
        if not file.exists():
            if not is_unused(self.folder):
                raise SystemExit(f"{self.folder} has files that are not a run of this program: give another --output")
            return
        if not resume:
            raise SystemExit(f"{self.folder} already has a run: continue it by --resume, or give another --output")
        try:
            saved = dict(json.loads(file.read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise SystemExit(f"{file} is damaged ({error}): restore it, or give another --output") from None
        if changed := [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]:
            what = "; ".join(f"{name} was {saved.get(name)!r}, now it is {settings.get(name)!r}" for name in changed)
            raise SystemExit(f"{self.folder} has a run with other settings: {what}. Give the same settings, or another --output")

    @property
    def has_checkpoint(self) -> bool:
        return bool(self._named(_CHECKPOINT))

    def load(self) -> None:
        """Load the newest checkpoint, if one exists.

        Raises:
            SystemExit: the checkpoint is damaged.
        """
        if not (whole := self._named(_CHECKPOINT)):
            return
        try:
            self.accelerator.load_state(str(whole[-1]))
        except Exception as error:  # each kind of file has a reader with exceptions of its own
            what = f"{type(error).__name__}: {error}"
            raise SystemExit(f"{whole[-1]} can't be read ({what}): restore it, or delete it to start from the beginning") from error
        self.accelerator.print(f"resuming from {whole[-1]}")

    def save(self, step: int) -> None:
        """Save a checkpoint of the accelerator's state."""
        part, whole = self.folder / f".step-{step:08}.part", self.folder / f"step-{step:08}"
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            part.rename(whole)
            for old in self._named(_CHECKPOINT)[:-1]:
                self._remove(old)
        self.accelerator.wait_for_everyone()

    def adapter(self, epoch: int) -> Path:
        """Return the folder of the adapter of this epoch, which was the best when it ended."""
        return self.folder / f"adapter-epoch-{epoch}"

    def keep_adapter(self, epoch: int) -> None:
        """Remove the adapters of all other epochs."""
        if self.accelerator.is_main_process:
            for old in self._named(_ADAPTER):
                if old != self.adapter(epoch):
                    self._remove(old)

    def _remove(self, folder: Path) -> None:
        # renamed first, so that a partly deleted folder is not taken for a complete one
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.part")))

    def _named(self, pattern: str) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(pattern, path.name))
