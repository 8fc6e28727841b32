"""docs/tour.ipynb, run as it stands, in a kernel of its own."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NOTEBOOK = Path("docs/tour.ipynb")


def printed(cell) -> str:
    """What a cell printed, without warnings of the libraries."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def results(cell) -> list:
    return [output for output in cell.outputs if output.output_type == "execute_result"]


def test_the_notebook_goes_through_and_prints_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    held = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    # An error in a cell ends it.
    NotebookClient(fresh, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pairs = [pair for pair in zip(held.cells, fresh.cells, strict=True) if "outputs" in pair[0]]
    for before, after in pairs:
        assert printed(before).count("\n") == printed(after).count("\n"), before.source
        assert len(results(before)) == len(results(after)), before.source
    analysis = next(pair for pair in pairs if "analyze" in pair[0].source)
    assert printed(analysis[0]) == printed(analysis[1]) != ""
