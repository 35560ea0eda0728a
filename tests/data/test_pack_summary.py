from vflora.data.pack_summary import PackSummary


def lines(**found) -> list[str]:
    nothing = {"size": (32, 48), "counts": {"train": {}, "val": {}}, "twins": [], "unreadable": {}}
    return PackSummary(**{**nothing, "lost": {}, "scales": {}, **found}).lines()


def test_ten_characters_are_named_and_the_others_counted():
    counts = {"train": {f"c{i:02}": i + 1 for i in range(12)}, "val": {"c00": 4}}
    assert "  c00 5, c01 2, c02 3, c03 4, c04 5, c05 6, c06 7, c07 8, c08 9, c09 10, and 2 more" in lines(counts=counts)


def test_three_near_duplicates_are_named_and_the_others_counted():
    found = lines(twins=[(f"{i}.png", "0.png") for i in range(1, 6)])
    place = found.index("  left out: 5 near-duplicates, 0 unreadable")
    assert found[place + 1 : place + 5] == [
        "    1.png looks like 0.png",
        "    2.png looks like 0.png",
        "    3.png looks like 0.png",
        "    and 2 more",
    ]


def test_only_what_loses_more_than_a_quarter_counts_as_cropped():
    assert not any("cropped" in line for line in lines(lost={"a.png": 0.25}))
    found = lines(lost={"a.png": 0.25, "b.png": 0.3, "c.png": 0.9, "d.png": 0.4})
    assert any("3 pictures lose more than a quarter of their area, c.png most (90%)" in line for line in found)


def test_only_what_is_enlarged_more_than_fourfold_is_named():
    found = lines(scales={"a.png": 4.0, "b.png": 4.5, "c.png": 6.0, "d.png": 0.5})
    assert any("enlarged: 3 pictures" in line for line in found)
    assert any(line.endswith("leave them out: c.png (6.0 times), b.png (4.5 times)") for line in found)
