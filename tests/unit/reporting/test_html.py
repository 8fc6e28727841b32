import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest
from torch import nn

from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import write_yaml
from cacp_ray.pruning.subnet import save_subnet
from cacp_ray.reporting.run_report import write_report
from tests.unit.reporting.synthetic import (
    RATES,
    make_episodes,
    make_learning,
    make_lines,
    make_own_result,
    make_result,
    make_run,
)

MANY_RATES = tuple(round(0.08 * i, 2) for i in range(1, 13))
DESCRIPTION = {
    "num_classes": 10,
    "model": "resnet20",
    "cost": "macs",
    "rate": 0.42,
    "cost_kept": 0.4199,
    "input_shape": [3, 32, 32],
    "macs": 17_000_000,
    "search": {"score": 0.8765},
    "candidates": {"policy_score": 0.8123, "search_score": 0.8321},
}
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Attributes and nesting of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def draw_nothing(figure, folder, name):
    """Stands in for `save_figure`, which takes seconds; its figures are tried elsewhere."""
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    folder.mkdir(exist_ok=True)
    for path in paths:
        path.write_bytes(b"a figure")
    return paths


def report(folder, result, count=60, rates=RATES, lines=None) -> str:
    run_dir = make_run(folder, result, lines)
    path = write_report(run_dir, make_episodes(count, rates), draw_nothing)
    assert path == folder / "report.html"
    return path.read_text("utf-8")


@pytest.mark.parametrize("rates", [(0.5,), RATES, MANY_RATES], ids=len)
def test_all_rates_are_in_the_report_with_code_to_load_them(tmp_path, rates):
    page = Page(report(tmp_path, make_result(rates), rates=rates))
    for rate in rates:
        code = f'net = cacp_ray.load_subnet("{tmp_path.as_posix()}/subnets/rate-{rate:.2f}")'
        assert code in page.text


def test_the_file_loads_nothing_from_elsewhere(tmp_path):
    html = report(tmp_path, make_result())
    page = Page(html)
    loaded = [value for _, a in page.tags for key, value in a.items() if key in ("src", "href")]
    assert len(loaded) == 6
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|@import|url\(", html)


def test_a_subnet_that_was_asked_for_later_is_there_to_load(tmp_path):
    run_dir = make_run(tmp_path, make_result())
    assert (
        "after the search"
        not in Page(write_report(run_dir, make_episodes(9), draw_nothing).read_text()).text
    )
    later = run_dir / "subnets" / "rate-0.42"
    save_subnet(later, nn.Linear(2, 2), DESCRIPTION)
    text = Page(write_report(run_dir, make_episodes(9), draw_nothing).read_text()).text
    after = text.split("after the search")[1]
    assert f'net = cacp_ray.load_subnet("{later.as_posix()}")' in after
    cells = ["0.42", "41.99", "17.00", "81.23", "83.21", "87.65"]
    assert [after.index(cell) for cell in cells] == sorted(after.index(cell) for cell in cells)


def test_the_short_table_is_of_the_best_split_that_is_known(tmp_path):
    before = report(tmp_path / "before", make_result(is_finetuned=False))
    after = report(tmp_path / "after", make_result())
    short = [page.split('class="short"')[1].split("</table>")[0] for page in (before, after)]
    assert "%, search" in short[0]
    assert "<td>81.71</td><td>\N{MINUS SIGN}10.29</td>" in short[0]
    assert "%, test" in short[1]


def test_fine_tuning_is_drawn_once_it_is_done(tmp_path):
    before = report(tmp_path / "before", make_result(is_finetuned=False))
    after = report(tmp_path / "after", make_result())
    assert ("Fine-tuning" in headings(before), "Fine-tuning" in headings(after)) == (False, True)
    assert (tmp_path / "after" / "figures" / "finetuning.svg").exists()


def headings(html: str) -> list[str]:
    return re.findall(r"<h[23]>(.*?)</h[23]>", html)


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_the_learning_of_an_agent_is_a_section_iff_there_is_some(tmp_path, count):
    lines = make_lines(count)
    result = make_result() | {"learning": make_learning(lines)}
    page = report(tmp_path, result, lines=lines)
    assert ("Learning" in headings(page)) == (count > 0)
    assert ("The policy alone, without search" in headings(page)) == (count > 1)
    plain = report(tmp_path / "plain", make_result())
    assert "Learning" not in headings(plain)
    assert page.count("<img") - plain.count("<img") == (0 if count == 0 else 3 if count == 1 else 4)


def test_the_captions_of_learning_say_what_is_measured_on_how_many_images(tmp_path):
    lines = make_lines(9)
    result = make_result() | {"learning": make_learning(lines)}
    text = " ".join(Page(report(tmp_path, result, lines=lines)).text.split())
    assert "Mean top-1 on 1,500 images of the search split" in text
    assert "on the first 1,000 images of the search split" in text
    assert "Dashed: rates that are not searched." in text


def test_values_are_escaped(tmp_path):
    nasty = "<script>alert('x')</script> & \"quotes\""
    result = make_result() | {"name": nasty, "strategy": nasty}
    result["base"]["model"] = nasty
    result["groups"][0]["name"] = nasty
    result["rates"][0]["path"] = f"subnets/{nasty}"
    html = report(tmp_path, result)
    assert "<script" not in html
    assert nasty in Page(html).text
    assert f"subnets/{nasty}".replace('"', '\\"') in Page(html).text


@pytest.mark.parametrize(
    ("result", "count"),
    [
        (make_result(is_finetuned=False, num_frontier=0), 0),
        (make_result(num_frontier=0), 1),
        (make_result(num_groups=60), 10),
    ],
    ids=["fresh", "one-episode", "sixty-groups"],
)
def test_a_run_of_any_size_is_reported(tmp_path, result, count):
    page = Page(report(tmp_path, result, count))
    assert ("without further search" in page.text) == bool(result["frontier"])


def test_what_fine_tuning_has_not_measured_is_a_dash_and_is_explained(tmp_path):
    page = Page(report(tmp_path, make_result(is_finetuned=False)))
    row = page.text.split("rate 0.30", 1)[1].split("rate 0.50", 1)[0]
    assert row.count("\N{EN DASH}") == 3
    assert "not fine-tuned yet" in page.text


def test_words_errors_phases_versions_and_configuration_are_stated(tmp_path):
    text = " ".join(Page(report(tmp_path, make_result())).text.split())
    for part in (
        "KEPT",
        "FLOPs = 2 MACs",
        "search split",
        "test split",
        "Standard error",
        "3 rates",
        "1 h 06 min",
        "60 recorded, 3 answered from memory, 1 failed",
        "2 processes on 1 node",
        "4.0 s (median) to build, repair and score on 5,000 images",
        "3 min 48 s of all evaluators, 47 % of the time of the search",
        "3 networks, 24 epochs, 1 h 00 min in trials",
        "torch",
        "rates:",
    ):
        assert part in text


def test_a_dark_page_a_narrow_page_and_paper_have_their_rules(tmp_path):
    html = report(tmp_path, make_result())
    for rule in ("prefers-color-scheme: dark", "max-width: 34rem", "@media print"):
        assert rule in html


def test_a_run_without_a_result_names_the_next_step(tmp_path):
    with pytest.raises(ArtifactError, match="finish the search"):
        write_report(tmp_path, make_episodes(0))


@pytest.mark.parametrize("name", ["environment.json", "config.yaml"])
def test_a_missing_file_is_named(tmp_path, name):
    run_dir = make_run(tmp_path, make_result())
    (run_dir / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        write_report(run_dir, make_episodes(0))


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    report(tmp_path, make_result())
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr("cacp_ray.io.files.os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(tmp_path, make_result() | {"name": "other"})
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_report_of_a_task_says_nothing_of_images(tmp_path):
    run_dir = make_run(tmp_path, make_own_result())
    data = {"train": "embedded:train"}
    write_yaml(run_dir / "config.yaml", {"name": "a", "data": data, "task": "mine:Task", "seed": 3})
    episodes = make_episodes(9)
    place = episodes.column_names.index("images")
    episodes = episodes.set_column(place, "images", pa.array([0] * 9))  # a task does not tell
    page = Page(write_report(run_dir, episodes, draw_nothing).read_text("utf-8"))
    body = page.text[page.text.index("made smaller at") :]
    assert "image" not in body
    assert "for one example and for a batch" in body
    assert "embedded" not in body
    assert "name: a\ntask: mine:Task\nseed: 3\n" in body


def test_the_report_of_images_shows_the_whole_configuration(tmp_path):
    run_dir = make_run(tmp_path, make_result())
    write_yaml(run_dir / "config.yaml", {"data": {"train": "embedded:train"}, "task": None})
    page = Page(write_report(run_dir, make_episodes(9), draw_nothing).read_text("utf-8"))
    assert "train: embedded:train\ntask: null\n" in page.text
    assert "for one image and for a batch" in page.text
