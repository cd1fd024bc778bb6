"""The pages of docs/ run as they stand, one after the other's snippets, leave no encoder and no setting out, and lead somewhere."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

from mope_fast import BAFConfig, supported_encoders
from mope_fast.encoders import families

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SNIPPETS = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in DOCS.glob("*.md")}


@pytest.mark.parametrize("page", [page for page, snippets in SNIPPETS.items() if snippets])
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    names = {"__name__": "docs"}
    for snippet in SNIPPETS[page]:
        exec(compile(snippet, page, "exec"), names)


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}" for page in SNIPPETS)])
def test_relative_links_resolve(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_has_every_page():
    links = re.findall(r"^\| \[(.*?)\]\((.*?)\) \|", (DOCS / "README.md").read_text(), re.MULTILINE)
    assert all(name == link for name, link in links)
    assert sorted(link for _, link in links) == sorted(set(SNIPPETS) - {"README.md"})


@pytest.mark.parametrize("page", ["concepts.md", "own_transformer.md", "coming_from_mope.md", "numerics.md", "performance.md"])
def test_a_page_that_promises_code_has_it(page):
    assert SNIPPETS[page]


def test_the_table_has_every_encoder_and_no_other():
    page, _, _ = (DOCS / "encoders.md").read_text().partition("## Refused")
    rows = re.findall(r"^\| `(\w+)` \|(.*)$", page, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(supported_encoders())
    for name, row in rows:
        assert all(f"`{model.rpartition('.')[2]}`" in row for model in supported_encoders()[name])


def test_the_page_says_what_is_refused_and_why():
    page = (DOCS / "encoders.md").read_text()
    rows = dict(
        re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", page[page.index("## Refused") : page.index("## Pooling")], re.MULTILINE)
    )
    told = {name: reason for names, reason in rows.items() for name in re.findall(r"`(\w+)`", names)}
    assert told == {model.rpartition(".")[2]: reason for model, reason in families._REFUSED.items()}


def test_the_page_of_mope_baf_has_every_setting_with_its_default():
    page = (DOCS / "mope_baf.md").read_text()
    assert len(SNIPPETS["mope_baf.md"]) == 2
    table = page[page.index("## Settings") : page.index("## A VLMo")]
    shown = {}
    for names, defaults in re.findall(r"^\| (`\w.*?) \| (.*?) \|", table, re.MULTILINE):
        names, values = (re.findall("`(.*?)`", cell) for cell in (names, defaults))
        values = [ast.literal_eval(value) for value in values] or [dataclasses.MISSING] * len(names)
        shown |= dict(zip(names, values, strict=True))
    assert shown == {field.name: field.default for field in dataclasses.fields(BAFConfig)}


def test_flags_of_the_page_on_the_release_are_those_of_the_program(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    program = pytest.importorskip("classify_jsonl", reason="needs the packages of the examples extra")
    page = (DOCS / "coming_from_mope.md").read_text()
    command = re.search(r"```bash\npython examples/classify_jsonl.py (.*?)```", page, re.DOTALL)[1].replace("\\\n", " ").split()
    monkeypatch.setattr("pathlib.Path.is_dir", lambda path: True)
    args = program.parse_arguments(command)
    assert (args.main, args.experts, args.complementary_lr, args.precision) == ("image", 4, 5e-4, "fp16")
    here = [cell for cell in re.findall(r"^\| `--.*?\| (.*?) \|", page, re.MULTILINE) if "`--fuse_method" not in cell]
    known = {option for action in program.make_parser()._actions for option in action.option_strings}
    assert set(re.findall(r"`(--[\w-]+)", " ".join(here))) <= known


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("rich", reason="needs the packages of the examples extra")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.syspath_prepend(ROOT / "examples")
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names = {"__name__": "docs"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "tutorial.ipynb", "exec"), names)
    assert names["right"] / len(names["labels"]) > 0.8


def test_the_readme_is_short():
    """What a newcomer reads in five minutes; the rest is on pages."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
