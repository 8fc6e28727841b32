"""HTML pages from the templates of this package; a page needs no other file."""

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cacp_ray.io.files import write_text


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes a page of escaped values, completely or not at all, and returns its path."""
    # jinja2 escapes only templates that it knows as HTML, and these names end in .jinja.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("cacp_ray.reporting")
    css = Markup(folder.joinpath("report.css").read_text("utf-8"))
    text = folder.joinpath(template).read_text("utf-8")
    page = environment.from_string(text).render(css=css, **values)
    write_text(path, page)
    return path
