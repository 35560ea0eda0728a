import json

import pytest
from PIL import Image

from vflora.world.ablation.arms import ARMS
from vflora.world.ablation.pictures import draw_grid, draw_plot
from vflora.world.ablation.summary import (
    Spread,
    ahead_of_recipe,
    gate_table,
    gates,
    number,
    ratio_to_base,
    read_results,
    recovered,
    table,
)


def marks(identity, path=1.0, loss=0.2, **more):
    return {
        "cosine_last_quarter": identity,
        "retrieval_first_quarter": 0.6,
        "retrieval_first_generated": 0.5,
        "retrieval_last_quarter": identity / 2,
        "path_ratio": path,
        "direction_accuracy": 0.95,
        "limb_ratio": 0.9,
        "base_domain_loss": loss,
        **more,
    }


@pytest.fixture
def output(tmp_path):
    """Two seeds of five arms, on disk as `vflora world arm` leaves them."""
    own = {"own_domain/retrieval_first_quarter": 0.9, "own_domain/retrieval_first_generated": 0.8}
    own["own_domain/direction_accuracy"] = 0.97
    for seed in (0, 1):
        numbers = {
            "base": marks(0.4 + 0.1 * seed, **own),
            "oracle": marks(0.8 + 0.1 * seed, path=1.02),
            "recipe": marks(0.6 + 0.15 * seed, path=0.98 - 0.04 * seed, loss=0.204),
            "identity": marks(0.7 + 0.1 * seed, path=0.5),
            "identity_placed": marks(0.3 + 0.1 * seed, path=0.85),
        }
        for arm, found in numbers.items():
            folder = tmp_path / "arms" / f"{arm}-{seed}"
            folder.mkdir(parents=True)
            result = {
                "arm": arm,
                "seed": seed,
                "numbers": found,
                "cosine_by_frame": [1.0, 0.8, 0.7, found["path_ratio"]],
            }
            (folder / "result.json").write_text(json.dumps(result))
            Image.new("RGB", (5 * 8, 4 * 8), (40 * list(numbers).index(arm), 90, 120)).save(folder / "frames.png")
    return tmp_path


def test_results_come_in_the_order_of_the_arms_and_seeds(output):
    results = read_results(output)
    assert list(results) == [arm for arm in ARMS if arm in ("base", "oracle", "recipe", "identity", "identity_placed")]
    assert [result["seed"] for result in results["recipe"]] == [0, 1]


def test_ratios_and_recovery_are_paired_by_seed(output):
    results = read_results(output)
    assert number(results, "base", "cosine_last_quarter").mean == pytest.approx(0.45)
    assert ratio_to_base(results, "recipe", "path_ratio").mean == pytest.approx(0.96)
    # (0.6 - 0.4) / 0.4 and (0.75 - 0.5) / 0.4
    assert recovered(results, "recipe") == Spread(pytest.approx(0.5625), pytest.approx(0.0884, abs=1e-4))


def test_one_seed_has_no_error_bar():
    assert Spread.of([0.25]) == Spread(0.25, None)
    assert Spread.of([0.25]).text(1, 100) == "25.0"
    assert Spread.of([0.2, 0.4]).text(2) == "0.30 ± 0.14"
    assert Spread.of([0.2, 0.4]).text(2, sign="+") == "+0.30 ± 0.14"


def test_what_an_arm_gains_on_the_recipe_is_paired_by_seed(output):
    results = read_results(output)
    # 0.7 - 0.6 and 0.8 - 0.75: the seeds differ by more than the arms do
    gain = ahead_of_recipe(results, "identity")
    assert gain == Spread(pytest.approx(0.075), pytest.approx(0.0354, abs=1e-4))
    assert "+0.075 ± 0.035" in table(results)
    assert ahead_of_recipe(results, "recipe") == Spread(0.0, 0.0)


def test_gates_hold_or_fail_by_the_bounds_that_were_written_down(output):
    found = {gate.name: gate.passed for gate in gates(read_results(output))}
    assert found == {
        "base: path direction, own domain": True,
        "base: retrieval, own domain, first quarter": True,
        "base: retrieval lost from first to last quarter, creatures": True,
        "A: identity alone loses motion": True,
        "A: identity alone loses motion, through the place-bound embedder": False,
        "B: gap to the oracle recovered, last quarter": True,
        "B: path length": True,
        "B: loss on the base's own domain": True,
    }
    worse = json.loads((output / "arms" / "recipe-0" / "result.json").read_text())
    worse["numbers"] |= {"cosine_last_quarter": 0.41, "path_ratio": 0.7, "base_domain_loss": 0.25}
    (output / "arms" / "recipe-0" / "result.json").write_text(json.dumps(worse))
    failed = [gate.name for gate in gates(read_results(output)) if not gate.passed]
    assert [name[0] for name in failed] == ["A", "B", "B", "B"]
    assert gate_table(gates(read_results(output))).count("FAILS") == 4


def test_gates_of_arms_that_have_not_run_are_not_asked(output):
    results = read_results(output)
    assert [gate.name[:4] for gate in gates({"base": results["base"]})] == ["base"] * 3
    assert gates({"recipe": results["recipe"]}) == []


def test_the_table_has_a_row_for_each_arm(output):
    rows = table(read_results(output)).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [
        ARMS[a].title for a in ("base", "oracle", "identity", "recipe", "identity_placed")
    ]
    assert "0.50 ± 0.00" in rows[2]


def test_plot_and_grid_show_every_arm(output):
    results = read_results(output)
    draw_plot(results, output / "plot.png")
    draw_grid(results, output, output / "grid.png")
    with Image.open(output / "plot.png") as plot, Image.open(output / "grid.png") as grid:
        assert plot.width > 1000
        assert grid.height == 5 * (12 + 4)
        colours = {grid.getpixel((grid.width - 12, row * 16 + 5)) for row in range(5)}
    assert colours == {(40 * arm, 90, 120) for arm in range(5)}
