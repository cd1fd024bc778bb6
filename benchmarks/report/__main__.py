import argparse
from pathlib import Path

from benchmarks import report


def main() -> None:
    parser = argparse.ArgumentParser(description=report.__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json", help="saved with --results or --benchmark-json")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the reports")
    options = parser.parse_args()
    if bool(options.files) != bool(options.output):
        parser.error("files and --output go together; without both the repository's own page is written")
    print(*(report.write(options.files, options.output) if options.files else report.write_kept()), sep="\n")


main()
