"""Several uses at the same time."""

import threading
from collections.abc import Callable
from typing import Any


def in_threads(*uses: Callable[[], Any], seconds: float = 60) -> list[Any]:
    """Results, or exceptions, of uses that begin together, each in a thread of its own."""
    results: list[Any] = [None] * len(uses)
    start = threading.Barrier(len(uses))

    def run(index: int) -> None:
        try:
            start.wait(seconds)
            results[index] = uses[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(uses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "a thread waits for ever"
    return results
