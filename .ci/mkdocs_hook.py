"""Hook of mkdocs: files of the repository outside of docs/ that its pages link to are pages, or files, of the site too."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = "project"
_LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what is linked to, and what these pages link to in turn."""
    waiting = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *_linked(Path(config.docs_dir).rglob("*.md"))]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file() or path.is_relative_to(config.docs_dir):
            continue
        seen.add(path)
        files.append(File.generated(config, _place(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            waiting += _linked([path])
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Links by the places that files have in the site; a folder, which has none, is named without a link."""
    source = Path(page.file.abs_src_path)

    def replaced(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        if target.is_dir():
            return f"]({match[2]})" if target.is_relative_to(config.docs_dir) else "](#)"
        place = target.relative_to(config.docs_dir).as_posix() if target.is_relative_to(config.docs_dir) else _place(target)
        return f"]({posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or '.')}{match[3] or ''})"

    return _LINK.sub(replaced, markdown)


def on_page_content(html: str, page: Page, config: Any, files: Files) -> str:
    """Sphinx's roles in docstrings, ``:class:`X```, are plain names here."""
    return re.sub(r":(?:class|meth|func|data|attr|mod):(?=<code>)", "", html)


def _place(path: Path) -> str:
    return f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}"


def _linked(pages: Any) -> list[Path]:
    return [(page.parent / match[2]).resolve() for page in pages for match in _LINK.finditer(page.read_text())]
