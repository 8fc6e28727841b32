"""Adds the pages that lie beside docs/ to the site, with links that lead within it."""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "clusters/README.md": "clusters.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "docs/tour.ipynb": "notebook.md",
}
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:|data:)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Called by MkDocs once it knows the files of docs/."""
    from mkdocs.structure.files import File  # tests import this module without MkDocs

    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        text = rewrite(read_notebook(text) if source.endswith(".ipynb") else text, source)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Called by MkDocs with the text of every page."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return rewrite(markdown, f"docs/{page.file.src_uri}")


def read_notebook(text: str) -> str:
    """A notebook as a page: texts, code, and what the code printed and drew."""
    parts: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif (image := output.get("data", {}).get("image/png")) is not None:
                parts.append(f"![Figure](data:image/png;base64,{''.join(image).strip()})")
    return "\n\n".join(parts) + "\n"


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
