"""Files are there whole or not at all."""

import os
import stat

from mope_fast._files import write_atomically


def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_afterwards(tmp_path, monkeypatch):
    events, replace = [], os.replace

    def fsync(descriptor):
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("name"), replace(*paths)))
    write_atomically(tmp_path / "file", b"12345")
    assert events == [5, "name", *(["folder"] if os.name == "posix" else [])]
    assert (tmp_path / "file").read_bytes() == b"12345"
