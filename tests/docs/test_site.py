"""The site builds, strictly, and what is generated is in it."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import vflora
from vflora.cli import COMMANDS, config_class_of, config_groups

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=250
    )
    assert built.returncode == 0, built.stderr
    return folder


def text_of(site, page):
    return html.unescape(re.sub(r"<[^>]+>", "", (site / page / "index.html").read_text()))


def test_the_reference_has_every_flag_of_every_command(site):
    page = text_of(site, "reference")
    starts = {command: page.index(f"\nvflora {command}¶") for command in COMMANDS}
    for command, start in starts.items():
        part = page[start : min((other for other in starts.values() if other > start), default=len(page))]
        for group in config_groups(config_class_of(command)):
            missing = [name for name in get_type_hints(group) if f"--{name}\n" not in part]
            assert missing == [], command


def test_the_python_page_documents_every_public_name_with_its_arguments(site):
    page = text_of(site, "python")
    assert [name for name in vflora.__all__ if name not in page] == ["__version__"]
    assert "starting noise, drawn on the CPU" in page  # of generate_video's seed


def test_formulas_are_drawn_by_the_browser_itself(site):
    page = (site / "recipe" / "index.html").read_text()
    assert page.count("<math") >= 5
    assert "\\frac" not in page


def test_the_table_of_the_readme_is_on_the_memory_page(site):
    row = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `--mode low_memory")
    )
    page = text_of(site, "memory")
    assert all(cell.strip(" `") in page for cell in row.strip("|").split("|"))


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("index.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="([^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="([^"]+)"', page.read_text()
        )
        assert [place for pair in loaded for place in pair if place.startswith(("http", "//"))] == []
