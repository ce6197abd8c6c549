"""The recorded cost of the loss kernels: the pages' tables have its figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "records" / "loss-model"
SIZES = {"rows": 256, "length": 65536, "dim": 128, "hard": 1024, "synthetic": 960, "dtype": "bfloat16"}


def recorded(name):
    """The record's launches by name, with their sum."""
    record = json.loads((FOLDER / name).read_text())
    assert record["capability"] == 90
    assert record["assumed"]
    (found,) = record["shapes"]
    assert {"synthetic": 960} | found["shape"] == SIZES, "the first record does not name M"
    launches = {launch["name"]: launch for launch in found["launches"]}
    for figure in ("instructions", "l2", "microseconds"):
        assert found["total"][figure] == pytest.approx(sum(launch[figure] for launch in launches.values()))
    return launches | {"sum": found["total"]}


def measured(figure="microseconds", day="now"):
    """Microseconds of each launch on the H100, with their sum."""
    record = json.loads((ROOT / "bench" / "records" / "h100" / "record.json").read_text())
    found = {name: each.get(figure) for name, each in record[day]["launches_us"]["bfloat16"].items()}
    whole = found.pop("all")
    return found | {"sum": sum(found.values()), "all": whole}


def tables(page):
    """The page's tables as lists of rows by their header, without marks."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", re.sub(r"[*`]", "", page.read_text()), re.M)
    rows = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]
    return [(tuple(header), body) for header, _, *body in rows]


def says(text, value):
    """Whether a number in a table is the value, rounded to the digits that are given."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - value) <= 0.5001 * 10**-digits


#: A column of the record's page, the figure and its unit.
COLUMNS = {
    "programs": ("programs", 1),
    "warps": ("warps", 1),
    "registers": ("registers", 1),
    "shared KiB": ("shared", 1024),
    "M warp instructions": ("instructions", 1e6),
    "MB through L2": ("l2", 1e6),
    "MB used": ("used", 1e6),
    "MB in sectors": ("l2", 1e6),
    "us": ("microseconds", 1),
    "waits": ("waits", 1),
}


@pytest.mark.parametrize(("place", "record"), [(0, "record.json"), (1, "before.json")])
def test_the_page_of_the_record(place, record):
    found, times = recorded(record), measured()
    header, rows = [table for table in tables(FOLDER / "README.md") if table[0][:2] == ("launch", "programs")][place]
    assert {row[0] for row in rows} == set(found), "each launch has a row"
    wrong = []
    for name, *cells in rows:
        for column, cell in zip(header[1:], cells, strict=True):
            if column == "bound":
                right = cell == found[name].get("bound", "")
            elif column == "measured us":
                right = says(cell, times[name])
            else:
                figure, unit = COLUMNS[column]
                right = says(cell, found[name][figure] / unit) if cell else figure not in found[name]
            wrong += [] if right else [(name, column, cell)]
    assert not wrong


def test_the_other_compilers_sums():
    total = recorded("record-triton-3.6.json")["sum"]
    page = (FOLDER / "README.md").read_text()
    (stated,) = re.findall(
        r"`record-triton-3.6.json`\) the same kernels take ([\d.]+) M instructions and (\d+) us", page
    )
    assert says(stated[0], total["instructions"] / 1e6)
    assert says(stated[1], total["microseconds"])


def test_the_waits_before_and_after():
    before, after = json.loads((FOLDER / "waits.json").read_text()).values()
    (rows,) = [body for header, body in tables(FOLDER / "README.md") if header[:2] == ("launch", "waits, Triton 3.6")]
    wrong = []
    for name, *cells in rows:
        for cell, compiler, figure in zip(
            cells, ("3.6.0", "3.8.0", "3.6.0"), ("waits", "waits", "microseconds"), strict=True
        ):
            launches = [record[f"Triton {compiler}"]["bfloat16"] for record in (before, after)]
            values = [
                sum(launch[figure] for launch in found.values()) if name == "all launches" else found[name][figure]
                for found in launches
            ]
            texts = cell.split(" -> ") if cell else []
            wrong += [(name, cell)] if not all(map(says, texts, values)) else []
    assert not wrong
    now, counted = recorded("record.json"), after["Triton 3.8.0"]["bfloat16"]
    # The others were changed since.
    assert all(says(f"{now[name]['waits']:.3f}", counted[name]["waits"]) for name in ("fill",))


#: A row of the page of the kernels, and its launches.
ROWS = {
    "sample": ["sample"],
    "rank": ["rank"],
    "scan": ["scan"],
    "select": ["select"],
    "slow path, no row flagged": ["fill", "choose"],
    "mix": ["mix"],
    "reduce": ["reduce"],
    "sum": ["sum"],
}


def test_the_page_of_the_kernels():
    now, times, added = recorded("record.json"), measured(), measured("added_us")
    header = ("launch", "million instructions", "waits", "L2 MB", "model us", "measured us", "added us")
    (rows,) = [body for found, body in tables(ROOT / "docs" / "kernels.md") if found == header]
    assert rows[-1] == ["all in one graph", "", "", "", "", f"{times['all']:.0f}", ""]
    assert [row[0] for row in rows[:-1]] == list(ROWS)

    def total(names, figure, unit=1.0):
        return sum(now[name].get(figure, 0) for name in names) / unit

    wrong = []
    for name, *cells in rows[:-1]:
        launches = ROWS[name]
        expected = [
            total(launches, "instructions", 1e6),
            total(launches, "waits"),
            total(launches, "used", 1e6),
            total(launches, "microseconds"),
            sum(times[one] for one in launches),
            sum(added[one] for one in launches),
        ]
        wrong += [
            (name, cell, value) for cell, value in zip(cells, expected, strict=True) if cell and not says(cell, value)
        ]
    assert not wrong
    page = (ROOT / "docs" / "kernels.md").read_text()
    (sectors,) = re.findall(r"which the model's time counts: (\d+) MB", page)
    assert says(sectors, now["sum"]["l2"] / 1e6)
    (parts,) = [body for header, body in tables(ROOT / "docs" / "kernels.md") if header[:2] == ("part", "MB now")]
    *rows, (_, whole, least, _) = parts
    assert abs(sum(float(row[1]) for row in rows) - float(whole)) <= 1
    assert says(whole, now["sum"]["used"] / 1e6)
    assert sum(float(row[2]) for row in rows) == float(least)


def test_the_model_beside_the_measurements():
    page = (FOLDER / "README.md").read_text()
    told = re.findall(
        r"gives (\d+) us for the launches that took (\d+) on the second day, and (\d+) for those of now", page
    )
    waited, _ = json.loads((FOLDER / "waits.json").read_text()).values()
    values = [sum(launch["microseconds"] for launch in waited["Triton 3.6.0"]["bfloat16"].values())]
    values.append(measured(day="second_day")["sum"])
    values.append(recorded("record-triton-3.6.json")["sum"]["microseconds"])
    assert len(told) == 1
    assert all(map(says, *told, values))
