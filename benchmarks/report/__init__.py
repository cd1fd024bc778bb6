"""Turn saved results into tables and plots; without arguments, turn the repository's results into benchmarks/REPORT.md.

Several files are repeated runs or parts of one device's suite: a size measured more than once gets the median of its medians. Every
op gets its own report, DIR/OP/report.md, and all together get a page, DIR/REPORT.md.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record, scaling_pictures, scaling_points
from benchmarks.report import overview, pictures, text
from benchmarks.report.model import Group, distinct, group, merge, parse, parse_skipped
from benchmarks.report.overview import Device
from benchmarks.report.profiles import PROFILES
from mope_fast._files import write_atomically

FOLDER = Path(__file__).parents[1]
RESULTS, PAGE, README = FOLDER / "results", FOLDER / "REPORT.md", FOLDER.parent / "README.md"


def read(files: Sequence[Path], folder: str = ".") -> Device:
    """Read the results of one device from files."""
    documents = [record.read(file) for file in files if file.suffix == ".json"]
    rows = merge(row for document in documents for row in parse(document))
    if not rows:
        raise SystemExit(f"no benchmark in {', '.join(map(str, files))}")
    if len({row.info["device"] for row in rows}) > 1:
        raise SystemExit(f"a report is about one device, but these files are from {distinct(rows, 'device')}")
    groups: dict[str, list[Group]] = {}
    for op in (op for op in PROFILES if any(row.info["op"] == op for row in rows)):
        groups[op] = group((row for row in rows if row.info["op"] == op), PROFILES[op])
        if PROFILES[op].baseline is not None:
            groups[op].sort(key=lambda each: (each.info["model"], -each.info["B"]))
    flatness = tuple(scaling_points.verdicts(row for row in rows if row.info["op"] == scaling_points.OP))
    return Device(rows, folder, groups, parse_skipped(documents), flatness=flatness)


def _with_curves(device: Device, folder: Path) -> Device:
    """Return the device with the names of the pictures in ``folder``."""
    return dataclasses.replace(device, curves=tuple(sorted(file.stem for file in folder.glob("*.svg"))))


def write(files: Sequence[Path], output: Path) -> list[Path]:
    """Write a report for each op and the page about all; return their paths."""
    device = read(files)
    reports = [*_write_parts(device, files, output), output / "REPORT.md"]
    write_atomically(reports[-1], overview.page([_with_curves(device, output / "scaling")]).encode())
    return reports


def _write_parts(device: Device, files: Sequence[Path], output: Path) -> list[Path]:
    """Write all reports except the page."""
    reports = _write_ops(device, output)
    if any(row.info["op"] == scaling_points.OP for row in device.rows) or any(file.suffix == ".jsonl" for file in files):
        reports += scaling_pictures.write(files, output / "scaling")
    return reports


def _write_ops(device: Device, output: Path) -> list[Path]:
    reports = []
    for op, groups in device.groups.items():
        folder = output / op
        folder.mkdir(parents=True, exist_ok=True)
        reports.append(folder / "report.md")
        names = pictures.plot_all(groups, PROFILES[op], folder)
        write_atomically(
            reports[-1], text.markdown(groups, PROFILES[op], [skip for skip in device.skipped if skip.op == op], names).encode()
        )
    return reports


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])


def kept() -> list[Device]:
    """Read the results that the repository keeps, GPUs first."""
    folders = [folder for folder in sorted(RESULTS.iterdir()) if any(folder.glob("*.json"))]
    devices = [_with_curves(read(_files(folder), folder.relative_to(FOLDER).as_posix()), folder / "scaling") for folder in folders]
    return sorted(devices, key=lambda device: device.type, reverse=True)


def pages(devices: Sequence[Device]) -> dict[Path, str]:
    """Return the page about all devices, and the README with its table from the devices that have all of its models."""
    written = {PAGE: overview.page(devices)}
    if complete := [*filter(overview.is_complete, devices)]:
        written[README] = overview.put(README.read_text(), overview.headline(complete))
    return written


def write_kept() -> list[Path]:
    reports, devices = [], []
    for device in kept():
        folder = FOLDER / device.folder
        reports += _write_parts(device, _files(folder), folder)
        devices.append(_with_curves(device, folder / "scaling"))  # reread, because pictures may have been added
    for path, content in pages(devices).items():
        write_atomically(path, content.encode())
        reports.append(path)
    return reports
