import json
import shlex

import pytest

from vflora.bench.table import BenchTableConfig, Row, markdown, rows, run, smallest_card
from vflora.cli import main
from vflora.errors import UserError

SMALL = {"size": "small", "resolutions": ["32x32"], "frames": [5], "dtype": "fp32", "device": "cpu", "steps": 1}


def measured(mode="fast", peak=None, **values):
    row = vars(Row(mode, "480x848", 17, "half", 1)) | {"row": "x", "command": f"vflora bench step --mode {mode}"}
    numbers = {"step_s": 4.0, "peak_gib": peak, "parts_s": {}, "device": "H200", "torch": "2.11"}
    return row | numbers | {"bench": {"batch_size": 2}} | values


def test_the_table_is_measured_row_by_row_and_goes_on_where_it_stopped(tmp_path, capsys):
    config = BenchTableConfig(tmp_path, modes=["exact"], decodes=["half"], **SMALL)
    assert run(config) == 0
    (path,) = (tmp_path / "rows").glob("*.json")
    first = path.stat().st_mtime_ns
    both = BenchTableConfig(tmp_path, modes=["exact", "low_memory"], decodes=["half"], **SMALL)
    low = rows(both)[1]
    of_another_version = {"command": shlex.join(low.command(both)), "speed": {"weight_storage": "int8"}, "step_s": 1e9}
    (path.parent / f"{low.name}.json").write_text(json.dumps(of_another_version))
    assert run(both) == 0
    assert path.stat().st_mtime_ns == first, "a row that was measured is kept"

    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["mode"] for row in table["rows"]] == ["exact", "low_memory"]
    assert all(row["s_per_step"] < 1e9 for row in table["rows"]), "one that was measured with other switches is not"
    assert all(row["samples_per_hour"] == pytest.approx(3600 / row["s_per_step"]) for row in table["rows"])
    assert {"rollout", "decode", "distillation"} <= set(table["rows"][0]["parts_s"])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines[:4]) == len([line for line in lines if line.startswith("|")]) == 4
    assert "--mode low_memory --size small --resolution 32x32 --frames 5" in lines[3]
    assert lines[0] in capsys.readouterr().out


def test_a_row_that_fails_is_said_with_its_log_and_tried_again(tmp_path, capsys):
    # Compiling is refused on CPUs, in the row's own process.
    flags = ["--modes", "fast", "--decodes", "full", "--size", "small", "--resolutions", "32x32", "--frames", "5"]
    assert main(["bench", "table", "--output", str(tmp_path), *flags, "--device", "cpu"]) == 1
    assert "fast-32x32-5-full-1 failed: see" in capsys.readouterr().out
    assert "--compile is for GPUs" in (tmp_path / "rows" / "fast-32x32-5-full-1.log").read_text()
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["failed"] == "exit code 2"
    assert not list((tmp_path / "rows").glob("*.json")), "nothing is kept of it"


def test_rows_of_a_smaller_card_say_so_in_their_command(tmp_path):
    config = BenchTableConfig(tmp_path, modes=["low_memory"], decodes=["half"], card_gib=16)
    (row,) = rows(config)
    assert "--card_gib 16" in " ".join(row.command(config))


@pytest.mark.parametrize(
    ("peak", "card"), [(9.9, 12), (10.1, 16), (14.0, 16), (14.9, 24), (55.4, 80), (95.6, None), (None, None)]
)
def test_a_card_needs_the_peak_and_the_headroom(peak, card):
    assert smallest_card(peak, 2.0) == card


def test_the_markdown_names_times_cards_and_commands():
    text = markdown([measured("low_memory", 14.9), measured("exact", 95.6), measured(failed="out of memory")], 2.0)
    small, large, none = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert "| 4.00 | 1,800 | 14.9 | 24 GB | `vflora bench step --mode low_memory` |" in small
    assert "over 80 GB" in large
    assert "| out of memory | - | - | - |" in none
    assert "2 GiB more" in text
    assert "H200, torch 2.11" in text


def test_rows_that_cannot_be_are_refused_before_any_is_measured(tmp_path):
    with pytest.raises(UserError, match="frames 16 is not of the form 4n"):
        BenchTableConfig(tmp_path, frames=[17, 16])
