"""Summary of `bench/gpu.sh`, from the JSON lines of its stages."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as tree
from pathlib import Path
from typing import Any

__all__ = ["summarise"]

_BAD = ("FAILED", "ERROR")
_RESULT = r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
#: Lines of ``pytest -v`` with processes of pytest-xdist and without.
_BY_WORKER = re.compile(rf"\[gw\d+\] (?:\[ *\d+%\] )?{_RESULT} (\S+\.py::.*?) *$")
_ALONE = re.compile(rf"(\S+\.py::.+?)(?: {_RESULT}\b.*| *)$")

#: The recorded cost model to print next to the figures.
_MODEL = Path(__file__).resolve().parent / "records" / "loss-model" / "record.json"


def summarise(folder: Path, model: Path = _MODEL) -> str:
    """Summarise the results in a few dozen lines.

    Args:
        folder: The folder with the files of `bench/gpu.sh`.
        model: A record of the cost model.
    """
    sections = [_parts(folder), _stages(folder), _launches(folder, model), _variants(folder), _tests(folder)]
    sections += [_compared(folder, "selection"), _compared(folder, "compare")]
    return "\n\n".join(section for section in sections if section) + "\n"


def _lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file. An incomplete last line is skipped."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _parts(folder: Path) -> str:
    file = folder / "parts.txt"
    return "stages\n" + file.read_text(encoding="utf-8").rstrip() if file.exists() else ""


def _stages(folder: Path) -> str:
    rows = []
    for file in sorted(folder.glob("stages-*.jsonl")):
        begun = ""
        for line in _lines(file):
            if "launch" in line:
                begun = line["launch"]
                continue
            begun = ""
            verdict = "; ".join(line["wrong"]) or ("right" if line.get("compared", True) else "not compared")
            rows.append(
                f"  {line['dtype']:9} {line['stage']:12} {verdict}{' (all keys equal)' * line.get('tied', False)}"
            )
        if begun:
            rows.append(f"  {file.stem.removeprefix('stages-'):9} {begun:12} never came back")
    return "\n".join(["each launch against float64", *rows]) if rows else ""


def _launches(folder: Path, model: Path) -> str:
    modelled: dict[str, float] = {}
    if model.exists():
        record = json.loads(model.read_text(encoding="utf-8"))
        modelled = {one["name"]: one["microseconds"] for one in record["shapes"][0]["launches"]}
        modelled["all"] = record["shapes"][0]["total"]["microseconds"]
    rows = []
    for file in sorted(folder.glob("launches-*.jsonl")):
        for line in _lines(file):
            known = modelled.get(line["launch"]) if line["dtype"] == "bfloat16" else None
            others = [f"{line[key]:10.1f}" if key in line else " " * 10 for key in ("added_us", "cold_us")]
            said = f"{known:10.1f}" if known is not None else ""
            rows.append(
                f"  {line['dtype']:9} {line['launch']:12} {line['microseconds']:10.1f} {' '.join(others)} {said}"
            )
    title = f"  {'us':22} {'graph':>10} {'added':>10} {'cold':>10} {'model':>10}"
    return "\n".join([title, *rows]) if rows else ""


def _variants(folder: Path) -> str:
    rows = []
    for line in _lines(folder / "variants.jsonl"):
        said = line.get("failed")
        if not said:
            own = line.get("launches", {}) if line["variant"] != "as it is" else {}
            said = f"{line['microseconds']:10.1f} us{'' if line['agrees'] else '  DIFFERS'}"
            said += "".join(f"   {name} {each:.1f}" for name, each in own.items())
        rows.append(f"  {line['variant']:44} {said}")
    return "\n".join(["variants", *rows]) if rows else ""


def _tests(folder: Path) -> str:
    """The results of the tests, from pytest's XML, or from its log if the time limit cut the tests off."""
    try:
        cases = list(tree.parse(folder / "tests.xml").getroot().iter("testcase"))
    except (OSError, tree.ParseError):
        return _cut_tests(folder / "tests.log")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"  {case.get('classname')}::{case.get('name')}" for case in failed]
    return "\n".join([f"tests: {len(cases)}, {len(failed)} failed, {skipped} skipped", *names])


def _cut_tests(log: Path) -> str:
    """What ``pytest -v`` had said of each test: its name when it began, and the result on that line or a later one."""
    if not log.exists():
        return ""
    ended, begun = dict[str, str](), list[str]()
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if found := _BY_WORKER.match(line):
            result, name = found.groups()
        elif found := _ALONE.match(line):
            name, result = found.groups()
        else:
            continue
        if not result:
            begun.append(name)
        elif ended.get(name) not in _BAD:
            ended[name] = result
    failed = [f"  {name}" for name, result in ended.items() if result in _BAD]
    skipped = sum(result == "SKIPPED" for result in ended.values())
    cut = [f"  {name} did not end" for name in dict.fromkeys(begun) if name not in ended]
    title = f"tests, cut off: {len(ended)} ended, {len(failed)} failed, {skipped} skipped"
    return "\n".join([title, *failed, *cut])


def _compared(folder: Path, name: str) -> str:
    rows = []
    for line in _lines(folder / f"{name}.jsonl"):
        if "failed" in line:
            rows.append(f"  {line['backend']:22} {line['failed']}")
            continue
        figures = [line["median_s"], *(line.get(key) for key in ("graph_s", "bare_s"))]
        cells = "".join(f"{1e6 * value:12.1f}" if value else " " * 12 for value in figures)
        rows.append(f"  {line['backend']:22}{cells}")
    title = f"  {name + ', us':22}{'called':>12}{'graph':>12}{'bare':>12}"
    return "\n".join([title, *rows]) if rows else ""


if __name__ == "__main__":
    print(summarise(Path(sys.argv[1])), end="")
