"""Runs classify_jsonl again and again, kills it at random moments, and looks at what is on disk after each; prints what it saw.

python kill_and_resume.py FOLDER OUTPUT KILLS SEED
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import classify_jsonl
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tiny_task import use_tiny_encoders

ARGUMENTS = ["--experts=4", "--prompt-length=2", "--batch-size=8", "--epochs=6", "--checkpoint-every=2", "--lr=3e-3", "--resume"]


def train(folder: Path, output: Path) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        classify_jsonl.main([str(folder), "--output", str(output), *ARGUMENTS, *sys.argv[5:]])


def start(folder: Path, output: Path) -> multiprocessing.Process:
    # a fork of a process that has imported everything and has no thread yet: seconds of a start are saved a hundred times
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder, output))
    process.start()
    return process


def look(output: Path) -> None:
    """Every file that has its final name is whole."""
    for file in output.rglob("*"):
        if any(part.startswith(".") for part in file.relative_to(output).parts) or file.is_dir():
            continue
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            assert [json.loads(line) for line in file.read_text().splitlines()]
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert len(list(tensors.keys()))
        elif file.suffix in (".pkl", ".bin"):
            torch.load(file, weights_only=False)
        elif "tfevents" in file.name:
            list(RawEventFileLoader(str(file)).Load())  # a cut last record is skipped
        elif file.suffix == ".html":
            assert file.read_text().rstrip().endswith("</html>")
        else:
            raise AssertionError(f"what is {file}?")
    for folder in output.glob("step-*"):
        assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl"} <= {file.name for file in folder.iterdir()}
    for folder in output.glob("adapter-*"):
        described = folder / "mope_fast.json"
        if described.exists():
            assert (folder / json.loads(described.read_text())["weights"]).exists()


def results(output: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in (output / "results.json", *output.glob("predictions-*.jsonl"))}


def adapter(output: Path) -> list[str]:
    """What is saved, by the hash of its content: a save beside what a killed one has left has a suffix behind it."""
    files = (file.relative_to(output) for file in output.glob("adapter-*/*") if not file.name.startswith("."))
    return sorted(re.sub(r"(/mope_fast-[0-9a-f]{16})-\w+", r"\1", file.as_posix()) for file in files)


def main() -> None:
    folder, output, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    use_tiny_encoders(output)
    draw = random.Random(seed)
    began = time.perf_counter()
    first = start(folder, output / "undisturbed")
    first.join()
    assert first.exitcode == 0
    whole = time.perf_counter() - began
    expected, expected_adapter = results(output / "undisturbed"), adapter(output / "undisturbed")
    done = rounds = 0
    steps_at_kill = []
    while done < kills or len(set(steps_at_kill)) < 2:  # a busy machine may spend all of a few kills in starts
        disturbed = output / "disturbed"
        shutil.rmtree(disturbed, ignore_errors=True)
        finished = False
        while not finished:
            process = start(folder, disturbed)
            process.join(draw.uniform(0, whole) if done < kills or len(set(steps_at_kill)) < 2 else 1000)
            if process.is_alive():
                process.kill()
                process.join()
                done += 1
                steps_at_kill.append(max((int(p.name[5:]) for p in disturbed.glob("step-*")), default=0))
            else:
                assert process.exitcode == 0, process.exitcode
                finished = True
            look(disturbed)
        rounds += 1
        assert results(disturbed) == expected
        assert adapter(disturbed) == expected_adapter  # names have a hash of the content
        assert {file.name for file in disturbed.glob(".*")} == {".lock"}
    print(json.dumps({"kills": done, "runs": rounds, "seconds": whole, "steps": steps_at_kill}))


if __name__ == "__main__":
    main()
