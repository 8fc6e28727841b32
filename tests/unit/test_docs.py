"""README and docs: commands and options exist, links lead somewhere, code is Python.

What the blocks of a page do is the matter of that page's own test; docs/tour.md is run as a whole
by tests/ray/test_tour.py.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer.main

import cacp_ray
from cacp_ray.cli import app

PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), Path("SECURITY.md")]
PAGES += [Path("clusters/README.md"), *sorted(Path("docs").glob("*.md"))]
README = PAGES[0].read_text()
COMMAND = re.compile(r"^ *cacp-ray .+$", re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line.strip() for line in COMMAND.findall(page.read_text())]


ALL = [(page, line) for page in PAGES for line in commands(page)]


def test_commands_are_found():
    assert len(commands(PAGES[0])) >= 4
    assert len(ALL) >= 25


@pytest.mark.parametrize(("page", "line"), ALL, ids=str)
def test_every_command_line_parses(page, line):
    _, name, *arguments = shlex.split(line, comments=True)
    group = typer.main.get_command(app)
    command = group.commands[name]
    if hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(name, arguments, resilient_parsing=False)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_linked_file_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_scripts_named_in_a_page_exist(page):
    for script in re.findall(r"\bbench/\w+\.py\b|\btune_configs/\w+\.yaml\b", page.read_text()):
        assert Path(script).exists(), script


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_code_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)


def test_every_page_can_be_reached_from_the_readme():
    reached, queue = set(), [PAGES[0]]
    while queue:
        page = queue.pop()
        reached.add(page.resolve())
        for target in re.findall(r"\]\(([^)#\s]+\.md)\)", page.read_text()):
            path = page.parent / target
            if path.exists() and path.resolve() not in reached:
                queue.append(path)
    assert {page.resolve() for page in PAGES} <= reached


def test_the_analysis_example_runs(capsys):
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "analyze" in b)
    exec(compile(block, "README.md", "exec"), {})
    assert "channel groups" in capsys.readouterr().out


def table_cells(page: str) -> set[str]:
    """Cells with a digit in the tables of a page, without their emphasis."""
    rows = [line for line in Path(page).read_text().splitlines() if line.startswith("|")]
    cells = {cell.strip().replace("*", "") for row in rows for cell in row.strip("|").split("|")}
    return {cell for cell in cells if re.search(r"\d", cell)}


def test_every_figure_of_the_conclusions_stands_in_a_full_table():
    known = table_cells("docs/results_appendix.md") | table_cells("docs/trained.md")
    assert len(known) > 500
    assert table_cells("docs/results.md") <= known
    sources = ("docs/results_appendix.md", "docs/trained.md")
    fractions = [set(re.findall(r"\d+\.\d+", Path(page).read_text())) for page in sources]
    assert set(re.findall(r"\d+\.\d+", Path("docs/results.md").read_text())) <= set().union(
        *fractions
    )


def test_the_newest_release_of_the_change_log_is_the_version():
    releases = re.findall(
        r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", Path("CHANGELOG.md").read_text(), re.M
    )
    assert releases[0] == cacp_ray.__version__


def slow_tests():
    """(File, name) of every test that `make test` leaves out in whole or in part."""
    for file in sorted(Path("tests").rglob("test_*.py")):
        tree = ast.parse(file.read_text())
        marked = {  # names of module level that hold the mark
            ast.unparse(node.targets[0])
            for node in tree.body
            if isinstance(node, ast.Assign) and "mark.slow" in ast.unparse(node.value)
        }
        if "pytestmark" in marked:
            yield file, ""
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                words = {
                    word for d in node.decorator_list for word in re.findall(r"\w+", ast.unparse(d))
                }
                if words & {"slow", "mostly_slow", *marked}:
                    yield file, node.name


def test_every_slow_test_has_a_row_in_the_table():
    rows = Path("docs/development.md").read_text()
    missing = [
        f"{file}: {name}"
        for file, name in slow_tests()
        if str(file.relative_to("tests")) not in rows or name not in rows
    ]
    assert missing == []
