"""A KeyboardInterrupt at one of the moments at which CPython looks for signals."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mope_fast


def interrupt(function: Callable[[], Any], event: int, part: str = "") -> int:
    """Raises at that moment in our code, or in a part of it ("encoders"); gives how many came, fewer if it was done before."""
    ours, seen = os.path.join(Path(mope_fast.__file__).parent, part), 0

    def profile(frame, kind, arg):
        nonlocal seen
        callers = (frame, frame.f_back)
        if kind in ("call", "c_return") and any(f is not None and f.f_code.co_filename.startswith(ours) for f in callers):
            seen += 1
            if seen == event:
                raise KeyboardInterrupt

    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None  # pytest's would keep frames, and what is in them
    sys.setprofile(profile)
    try:
        function()
    except KeyboardInterrupt:
        pass
    except Exception:
        # compiled code that asks Python something may make another error of it
        if not 0 < event <= seen:
            raise
    finally:
        sys.setprofile(None)
        sys.unraisablehook = hook
    return seen
