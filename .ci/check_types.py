"""Compare mypy's errors with those that are known: a file may have fewer than before, and never more.

    python .ci/check_types.py            # exit status 1 where a file has more errors than .ci/known_type_errors.json says
    python .ci/check_types.py --write    # write that file anew, where some were mended

torch's annotations and mypy differ from release to release: with others than those of the file errors are told, not judged.
"""

import collections
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / ".ci" / "known_type_errors.json"


def errors_by_file() -> dict[str, list[str]]:
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-color-output"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        raise SystemExit(run.stdout + run.stderr)
    found: dict[str, list[str]] = collections.defaultdict(list)
    for line in run.stdout.splitlines():
        if match := re.match(r"([^:]+):\d+: error: ", line):
            found[match[1]].append(line)
    return found


def main() -> None:
    found, versions = errors_by_file(), {name: ".".join(version(name).split(".")[:2]) for name in ("torch", "mypy")}
    counts = {file: len(lines) for file, lines in sorted(found.items())}
    if "--write" in sys.argv:
        KNOWN.write_text(json.dumps({"versions": versions, "errors": counts}, indent=1) + "\n")
    known = json.loads(KNOWN.read_text())
    more = [file for file, count in counts.items() if count > known["errors"].get(file, 0)]
    fewer = [file for file, count in known["errors"].items() if count > counts.get(file, 0)]
    total = f"{sum(counts.values())} known errors in {len(counts)} files"
    if versions != known["versions"]:
        print(f"types: not judged, {KNOWN.name} is of {known['versions']}, here is {versions}; {total}")
        return
    for file in more:
        print(*found[file], sep="\n")
    hint = "; run with --write" if fewer else ""
    print(f"types: {total}; more than before in {more or 'none'}, fewer in {fewer or 'none'}{hint}")
    if more:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
