import json
import re

import pytest

from vflora.errors import UserError
from vflora.report import write_page
from vflora.report.axes import spread, ticks

ONE = (("Momo", 0.5),)


@pytest.fixture(scope="module")
def page(tmp_path_factory, make_comparison):
    folder = tmp_path_factory.mktemp("page")
    return write_page(make_comparison(folder, notice="Small models <b>only</b>"), folder)


def test_nothing_on_the_page_comes_from_elsewhere(page):
    html = page.read_text()
    assert not re.search(r"""(?:src|href|url|action)\s*[=(]\s*["']?(?!data:)[\w./]""", html.split("<script>")[0])
    assert "default-src 'none'" in html
    assert "http://" not in html
    assert "https://" not in html


def test_text_is_escaped_and_the_notice_stands_first(page):
    html = page.read_text()
    assert "Small models &lt;b&gt;only&lt;/b&gt;" in html
    assert "hops &lt;fast&gt; &amp; far" in html
    assert html.index("Small models") < html.index("<h1>")


def test_best_and_worst_come_first_with_their_gain(page):
    html = page.read_text()
    places = [html.index(f"<h3>{name}") for name in ("Momo", "Zig", "Pip")]
    assert places == sorted(places)
    assert re.search(r"<h3>Zig <span class=\"badge loss\">Smallest gain −0\.", html)
    assert places[1] < html.index("In numbers") < places[2]


def test_the_headline_is_honest_about_a_lora_that_makes_it_worse(tmp_path, make_comparison):
    html = write_page(make_comparison(tmp_path, gains=(("Momo", -0.4),)), tmp_path).read_text()
    assert "farther from" in html
    assert "0 of 1 clips are closer" in html


def test_a_difference_that_is_nothing_is_called_nothing(tmp_path, make_comparison):
    html = write_page(make_comparison(tmp_path, gains=(("Momo", 0.0004),)), tmp_path).read_text()
    assert re.search(r"as close to\s+their picture as\s+with the base model", html)
    assert '<b class="same">±0.00</b>' in html
    assert "closer to" not in html


def test_the_numbers_lie_beside_the_page(page):
    data = json.loads((page.parent / "index.json").read_text())
    assert data["best_scale"] == 0.5
    assert [row["character"] for row in data["rows"]] == ["Momo", "Zig", "Pip"]


def test_a_page_over_the_limit_is_encoded_smaller_until_it_fits(tmp_path, make_comparison):
    comparison = make_comparison(tmp_path, gains=ONE)
    whole = write_page(comparison, tmp_path).stat().st_size
    smaller = write_page(comparison, tmp_path, max_megabytes=0.97 * whole / 1e6).stat().st_size
    assert smaller <= 0.97 * whole


def test_a_page_that_can_never_fit_says_what_to_leave_out(tmp_path, make_comparison):
    with pytest.raises(UserError, match="fewer pictures"):
        write_page(make_comparison(tmp_path, gains=ONE), tmp_path, max_megabytes=0.01)
    assert not (tmp_path / "index.html").exists()


def test_labels_keep_their_order_and_do_not_touch():
    heights = spread([100.0, 101.0, 40.0, 102.0])
    assert heights[2] < heights[0] < heights[1] < heights[3]
    assert min(b - a for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False)) >= 17


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.3), (-0.21, 0.98), (0.901, 0.9031)])
def test_ticks_are_few_round_numbers_inside_the_range(low, high):
    places = ticks(low, high, 4)
    assert 2 <= len(places) <= 6
    assert low <= places[0] < places[-1] <= high
