"""Locks that a forked process finds free, whoever held them."""

import os
import threading
import weakref


class Guarded:
    """Has a re-entrant ``lock``. In a forked process it is a new one: the thread that held the old one may not be there."""

    def __init__(self) -> None:
        self.renew()
        _guarded.add(self)

    def renew(self) -> None:
        """Start with a lock that nobody holds."""
        # a bare one: between taking it and entering the block of ``with`` no interrupt can come
        self.lock = threading.RLock()


_guarded: weakref.WeakSet[Guarded] = weakref.WeakSet()


def _renew_all() -> None:
    for owner in _guarded:
        owner.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
