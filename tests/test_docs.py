"""The pages of docs/ run as they stand, one after the other's snippets, and leave no encoder out."""

import re
from pathlib import Path

import pytest

from mope_fast import supported_encoders
from mope_fast.encoders import families

DOCS = Path(__file__).parents[1] / "docs"
SNIPPETS = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in DOCS.glob("*.md")}


@pytest.mark.parametrize("page", [page for page, snippets in SNIPPETS.items() if snippets])
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    names = {"__name__": "docs"}
    for snippet in SNIPPETS[page]:
        exec(compile(snippet, page, "exec"), names)


def test_encoders_page_has_snippets():
    assert len(SNIPPETS["encoders.md"]) == 2


def test_the_table_has_every_encoder_and_no_other():
    rows = re.findall(r"^\| `(\w+)` \|(.*)$", (DOCS / "encoders.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(supported_encoders())
    for name, row in rows:
        assert all(f"`{model.rpartition('.')[2]}`" in row for model in supported_encoders()[name])
