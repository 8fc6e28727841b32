"""Adds the pages that lie beside docs/ to the site, with links that lead within it."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "clusters/README.md": "clusters.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs once it knows the files of docs/."""
    for source, page in PAGES.items():
        text = rewrite((ROOT / source).read_text(), source)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Called by MkDocs with the text of every page."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return rewrite(markdown, f"docs/{page.file.src_uri}")


def rewrite(text: str, source: str) -> str:
    """The text of a file with links between files of the repository as links between pages.

    Links to files that are no pages, such as LICENSE, lose their target.
    """

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        if target in PAGES:
            return PAGES[target]
        return target.removeprefix("docs/") if target.startswith("docs/") else "index.md"

    return LINK.sub(lead, text)
