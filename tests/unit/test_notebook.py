"""docs/tour.ipynb as it is committed; `tests/ray/test_notebook.py` runs it."""

import ast
import json
import re
from pathlib import Path

from docs import hooks

CELLS = json.loads(Path("docs/tour.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_was_run_from_its_first_cell_to_its_last_without_an_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        ast.parse("".join(cell["source"]))
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output["text"]
    assert sum(bool(cell["outputs"]) for cell in CODE) >= len(CODE) - 1  # imports print nothing


def test_no_output_names_a_place_of_the_machine_that_ran_it():
    for cell in CODE:
        for output in cell["outputs"]:
            text = "".join(output.get("text", "")) + str(output.get("data", {}).get("text/plain"))
            assert not re.search(r"/(tmp|root|home|work)/", text)


def test_the_site_shows_every_cell_with_what_it_printed():
    page = hooks.read_notebook(Path("docs/tour.ipynb").read_text())
    blocks = re.findall(r"```python\n(.*?)\n```", page, re.DOTALL)
    assert blocks == ["".join(cell["source"]) for cell in CODE]
    for cell in CELLS:
        if cell["cell_type"] == "markdown":
            assert "".join(cell["source"]) in page
    shown = re.findall(r"```text\n(.*?)\n```", page, re.DOTALL)
    streams = [o for cell in CODE for o in cell["outputs"] if o["output_type"] == "stream"]
    assert shown == ["".join(output["text"]).rstrip() for output in streams]
    assert page.count("](data:image/png;base64,") == 1


def test_links_of_the_notebook_lead_to_pages():
    for cell in CELLS:
        for target in re.findall(r"\]\(([^)#\s]+)\)", "".join(cell["source"])):
            assert (Path("docs") / target).exists(), target
