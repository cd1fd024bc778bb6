"""Locks that are free in a forked process, even if another thread held them."""

import os
import threading
import weakref


class Guarded:
    """Has a re-entrant ``lock``, which is a new one in a forked process: the thread that held the old one may not exist there."""

    def __init__(self) -> None:
        self.renew()
        _guarded.add(self)

    def renew(self) -> None:
        """Create a free lock."""
        # a bare RLock: no interrupt can come between acquiring it and entering the ``with`` block
        self.lock = threading.RLock()


_guarded: weakref.WeakSet[Guarded] = weakref.WeakSet()


def _renew_all() -> None:
    for owner in _guarded:
        owner.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
