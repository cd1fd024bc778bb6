import argparse
from pathlib import Path

from benchmarks import report


def main() -> None:
    parser = argparse.ArgumentParser(description=report.__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="saved with pytest --benchmark-json")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets OP/report.md and plots for each op")
    options = parser.parse_args()
    print(*report.write(options.files, options.output), sep="\n")


main()
