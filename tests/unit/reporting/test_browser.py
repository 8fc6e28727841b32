"""The report in a real browser, where one is installed: no console error, nothing too wide."""

import re
import shutil
import subprocess

import pytest

from cacp_ray.reporting.run_report import write_report
from tests.unit.reporting.synthetic import (
    make_episodes,
    make_learning,
    make_lines,
    make_result,
    make_run,
)

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
)
# Written into the page's title by the page itself: the only script, and a test's.
MEASURE = (
    "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script>"
)

TABLE = {"device": "cpu", "threads": 1, "batch": 1, "processor": "a CPU", "error": 0.05}

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def load(folder, page, width=1400):
    """The rendered page and the messages of the browser's console."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},2000", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module", params=["macs", "latency"])
def report(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("run")
    lines = make_lines(20)
    result = make_result(num_groups=40) | {"learning": make_learning(lines)}
    if request.param == "latency":
        result |= {"cost": "latency and macs / 1.2", "latency_table": TABLE}
        for row in (result["base"], *result["rates"]):
            row |= {"predicted_latency_ms": 1.25, "measured_latency_ms": 1.31}
    return write_report(make_run(folder, result, lines), make_episodes(120))


def test_the_console_is_read(tmp_path):
    page = tmp_path / "page.html"
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    page.write_text(
        f"<html><head>{policy}</head><body><img src='http://a.test/x.png'></body></html>"
    )
    assert load(tmp_path, page)[1]


def test_the_report_has_no_console_error(tmp_path, report):
    dom, errors = load(tmp_path, report)
    assert errors == []
    assert "How many channels stay" in dom


@pytest.mark.parametrize("width", [500, 1400])
def test_the_page_is_as_wide_as_its_window(tmp_path, report, width):
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text())
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", MEASURE + "</body>"))
    dom, _ = load(tmp_path, page, width)
    content, window = map(int, re.search(r"<title>(\d+)/(\d+)</title>", dom).groups())
    assert content <= window
