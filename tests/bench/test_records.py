"""The records and the pages that quote them: each figure of these tables is computed again from the JSON."""

from __future__ import annotations

import json
import re
from statistics import mean, median, stdev

import pytest

from tests.bench.test_cost_record import ROOT, says, tables

RECORDS = ROOT / "bench" / "records"
STUDIES = sorted(path.parent for path in RECORDS.rglob("study.json"))


def read(name):
    return json.loads((RECORDS / name).read_text(encoding="utf-8"))


H100 = read("h100/record.json")


def rows_of_all(page, *columns):
    """The rows of the page's one table whose header begins so."""
    (found,) = [rows for header, rows in tables(ROOT / page) if header[: len(columns)] == columns]
    return found


def rows_of(page, *columns):
    """The same by their first cell."""
    return {cells[0]: cells[1:] for cells in rows_of_all(page, *columns)}


def digits(text):
    """The numbers in a cell."""
    return re.findall(r"\d[\d,]*(?:\.\d+)?", text)


def wrong_in(rows, expected):
    """The rows in which a number is not the expected one; None stands for what is not in the record."""
    assert rows.keys() >= expected.keys()
    found = []
    for name, values in expected.items():
        numbers = [number for cell in rows[name] for number in digits(cell)]
        assert len(numbers) >= len(values), name
        found += [
            (name, number, value)
            for number, value in zip(numbers, values, strict=False)
            if value is not None and not says(number, value)
        ]
    return found


def summary(found):
    """A mean of a study as its page prints it."""
    values = list(found["by_seed"].values())
    if not values:
        return ""
    assert found["mean"] == pytest.approx(mean(values))
    return f"{mean(values):.1%}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def name_of(figure):
    """Pages made before a protocol was a part of the name do not have it."""
    return figure.partition(" (")[0]


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.relative_to(RECORDS).as_posix())
def test_the_page_of_a_study(folder):
    record, page = json.loads((folder / "study.json").read_text()), (folder / "README.md").read_text(encoding="utf-8")
    assert f"`{record['command']}`" in page
    assert f"commit {record['environment']['commit']}" in page
    rows = {(row["setting"], row["method"]): row for row in record["rows"]}
    differences = {
        (each[side], f"{each[told]} - {each['baseline']}", name_of(each["figure"])): each
        for kind, side, told in (("differences", "setting", "method"), ("setting_differences", "method", "setting"))
        for each in record.get(kind, [])
    }
    count = 0
    for header, body in tables(folder / "README.md"):
        for cells in body:
            told, count = dict(zip(header, cells, strict=True)), count + 1
            if "difference" in told:
                setting = "" if header[0] == "difference" else cells[0]
                each = differences[setting, told["difference"], name_of(told["figure"])]
                values = [100 * value for value in each["by_seed"].values()]
                assert told["mean"] == f"{mean(values):+.1f}"
                assert told["deviation"] == f"{stdev(values):.1f}"
                assert told["standard error"] == f"{stdev(values) / len(values) ** 0.5:.1f}"
                assert told["each seed"] == ", ".join(f"{value:+.1f}" for value in values)
                continue
            row = rows[told.get("setting", ""), told["method"]]
            figures = {name_of(name): figure for name, figure in row["figures"].items()}
            if "lowest" in told:
                by_seed = figures[name_of(told["figure"])]["by_seed"]
                assert told["lowest"] == f"{min(by_seed.values()):.1%}"
                assert told["highest"] == f"{max(by_seed.values()):.1%}"
                assert told["each seed"] == ", ".join(f"{seed}: {value:.1%}" for seed, value in by_seed.items())
                continue
            assert told["untrained kNN"] == summary(row["untrained"])
            for name in header[header.index("untrained kNN") + 1 :]:
                figure = figures.get(name_of(name))
                assert told[name] == ("" if figure is None else summary(figure)), (told["method"], name)
    assert count > 3


def by(rows, *keys, **only):
    """Rows of a list in the record by some of their figures."""
    chosen = [row for row in rows if all(row.get(key) == value for key, value in only.items())]
    return {tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]: row for row in chosen}


def test_the_loss_on_an_h100():
    found = by(H100["now"]["compare"], "backend")
    best = found["triton"]["graph_s"]
    forms = {
        "triton": "triton",
        "one product, torch.topk, cross-entropy; no synthetic negatives": "topk",
        "reference under torch.compile": "compiled",
        "baseline with the cost of the released code": "released",
        "reference": "reference",
        "blockwise": "blockwise",
    }
    expected = {
        form: [found[name]["median_s"] * 1e3, found[name]["graph_s"] * 1e3, found[name]["graph_s"] / best]
        for form, name in forms.items()
    }
    assert not wrong_in(rows_of("bench/records/h100/README.md", "form", "called, ms"), expected)
    forms["product, torch.topk and cross-entropy, without synthetic negatives"] = "topk"
    rows = rows_of("docs/kernels.md", "form", "ms")
    assert rows.keys() <= forms.keys()
    assert not wrong_in(rows, {form: [found[forms[form]]["graph_s"] * 1e3] for form in rows})
    loss = rows_of("README.md", "what", "synco-fast")["loss and gradient, B = 256, K = 65,536, CUDA graph"]
    printed = [number for cell in loss for number in digits(cell)]
    told = [found[name]["graph_s"] * 1e3 for name in ("triton", "released", "compiled", "topk")]
    assert all(says(number, value) for number, value in zip(printed, told, strict=True))
    found = by(H100["now"]["selection"], "backend")
    told = [found[name]["graph_s"] * 1e6 for name in ("triton", "topk", "topk-only")]
    for page, sentence in (
        ("docs/kernels.md", r"takes\s(\d+) us, product and `torch.topk` (\d+) us, `topk` alone (\d+)"),
        ("bench/records/h100/README.md", r"takes (\d+) us as a graph; .*?product takes (\d+) us, `topk` alone (\d+)"),
    ):
        (printed,) = re.findall(sentence, (ROOT / page).read_text(encoding="utf-8"), re.S)
        assert all(says(number, value) for number, value in zip(printed, told, strict=True)), page


def test_the_launches_on_an_h100():
    columns = [
        ("first_contact", "bfloat16", "microseconds"),
        ("before", "bfloat16", "microseconds"),
        ("second_day", "bfloat16", "microseconds"),
        ("now", "bfloat16", "microseconds"),
        ("now", "bfloat16", "added_us"),
        ("now", "bfloat16", "cold_us"),
        ("first_contact", "float32", "microseconds"),
        ("second_day", "float32", "microseconds"),
        ("now", "float32", "microseconds"),
    ]
    expected = {
        ("all, in one graph" if name == "all" else name): [
            None,
            *(
                H100[time]["launches_us"][dtype][name][figure]
                for time, dtype, figure in columns
                # All launches together are added to none.
                if (name, figure) != ("all", "added_us")
            ),
        ]
        for name in H100["now"]["launches_us"]["bfloat16"]
    }
    assert not wrong_in(rows_of("bench/records/h100/README.md", "launch", "predicted"), expected)


def test_norms_and_steps_on_an_h100():
    norms, steps = H100["norm"]["graph_totals_s"], by(H100["step"]["results"], "run", "subject", "engine")
    names = {
        "modules, a call per group (grouped)": "grouped",
        "PyTorch's functions (native)": "native",
        "one group for the whole batch (plain)": "plain",
        "kernels (triton)": "triton",
    }
    expected = {form: [norms[name] * 1e3, norms[name] / norms["grouped"]] for form, name in names.items()}
    assert not wrong_in(rows_of("bench/records/h100/README.md", "form", "ms", "ratio"), expected)
    plain, fused = steps[1, "encoder-plain", "graph"]["median"], steps[1, "encoder", "graph"]["median"]
    whole, alone = steps[4, "synco", "graph"]["median"], steps[4, "encoder", "graph"]["median"]
    data = {row["workers"]: row for row in H100["data"]["pipeline_now"] if row["fused"]}[8]["images_per_second"]
    pil = by(H100["data"]["bench_data"]["results"], "pipeline")["pil"]["images_per_second"]
    trained = median(line["images_per_second"] for line in H100["data"]["training"]["three batches in flight"][3:])
    expected = {
        "batch norm in 8 groups, add and ReLU, all of a ResNet-50 at B = 256, CUDA graph": [
            norms[name] * 1e3 for name in ("triton", "grouped", "plain")
        ],
        "both encoders of a step, ResNet-50 at 224 pixels, B = 256, CUDA graph": [fused, plain],
        "a whole SynCo step of that size, without data": [whole, alone],
        "two views of 224 pixels from JPEG files, DALI with fused views, 16 cores": [data, pil],
    }
    rows = rows_of("README.md", "what", "synco-fast")
    assert not wrong_in(rows, expected)
    # In hundreds and tens.
    assert [number for cell in rows["a SynCo run on such files"] for number in digits(cell)] == [
        f"{round(trained, -1):,.0f}",
        f"{whole:,.0f}",
    ]
    page = (ROOT / "docs" / "norm.md").read_text(encoding="utf-8")
    assert f"{fused / plain:.2f} times the images/s with the kernels, {fused:,.0f} instead of {plain:,.0f}" in page
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"{whole / alone:.3f} of the\nimages/s of its encoders alone: {whole:,.0f} of {alone:,.0f}" in page
    eager = steps[1, "encoder", "eager"]["median"]
    assert f"a graph made {fused / eager:.2f} times eager's images/s for the encoders" in page


def test_data_on_an_h100():
    found = by(H100["data"]["bench_data"]["results"], "pipeline")
    now = {row["fused"]: row for row in H100["data"]["pipeline_now"] if row["workers"] == 8}
    before = {row["fused"]: row for row in H100["data"]["pipeline_before"][2::3]}
    expected = {
        "pil": found["pil"],
        "torchvision, with simplejpeg": found["torchvision"],
        "dali": now[False],
        "dali, fused views": now[True],
        "resident, 32 x 32": found["resident-32"],
        "resident, 32 x 32, fused views": found["resident-32-fused"],
    }
    pages = [("docs/data.md", ("pipeline", "images/s"), expected)]
    expected = {
        "the plain loader of the released code, pil": found["pil"],
        "torchvision": found["torchvision"],
        "dali, before": found["dali"],
        "dali with fused views, before": found["dali-fused"],
        "dali, data.decode windows": found["dali-windows"],
        "resident, images of 32 pixels": found["resident-32"],
        "resident with fused views, images of 32 pixels": found["resident-32-fused"],
    }
    pages.append(("bench/records/h100/README.md", ("pipeline", "images/s"), expected))
    for page, header, rows in pages:
        told = {name: [row["images_per_second"], row["processor_milliseconds"]] for name, row in rows.items()}
        assert not wrong_in(rows_of(page, *header), told)
    (rows,) = [
        body
        for header, body in tables(RECORDS / "h100" / "README.md")
        if header[0] == "pipeline, 8 readers, two batches in flight"
    ]
    for (_, *cells), row in zip(rows, (before[True], now[True], before[False], now[False]), strict=True):
        assert says(cells[0], row["images_per_second"])
        assert says(cells[1], row["processor_milliseconds"])
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"DALI makes the views of {now[True]['images_per_second']:,.0f} images/s" in changelog
    alone = [
        by(H100["data"]["decoder_alone"], "load", "threads", "fancy")[key]["images_per_second"]
        for key in (
            (0.99, 6, True),
            (0.99, 16, True),
            (0.5, 16, True),
            (0.0, 16, True),
            (0.99, 6, False),
            (0.99, 16, False),
        )
    ]
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"DALI's decoder alone decodes .*?\(\[record\]", page, re.S)
    printed = [number.replace(",", "") for number in re.findall(r"\d+,\d{3}|\b7,\d{3}", text)]
    assert [float(number) for number in printed] == alone
    (text,) = re.findall(r"Medians of the log lines.*?It waits", (RECORDS / "h100" / "README.md").read_text(), re.S)
    lines = H100["data"]["training"]["full first batch"][3:]
    step = 256e3 / median(line["images_per_second"] for line in lines)
    waits = median(line["data_wait"] for line in lines)
    assert says(*re.findall(r"Of the (\d+) ms", text), step)
    assert says(*re.findall(r"the other (\d+)", text), step * (1 - waits))
    trained = {
        name: [median(line[figure] for line in lines[3:]) for figure in ("images_per_second", "data_wait")]
        for name, lines in H100["data"]["training"].items()
        if name in ("full first batch", "three batches in flight")
    }
    sentences = r"trains on these files at ([\d,]+) images/s .*? waits for data (\d+) %.* waited (\d+) %, at ([\d,]+) "
    told = re.findall(sentences, page, re.S)
    (fast, wait, waited, slow), (before, now) = told[0], trained.values()
    assert [fast, slow] == [f"{round(rate, -1):,.0f}" for rate in (now[0], before[0])]
    assert says(wait, now[1] * 100)
    assert says(waited, before[1] * 100)


def test_the_loss_on_a_cpu():
    found = by(read("loss-cpu/record.json")["results"], "backend")
    first = found["released"]
    forms = {
        "released: baseline with the cost of the released code": "released",
        "reference": "reference",
        "reference under torch.compile": "compiled",
        "blockwise": "blockwise",
    }
    expected = {}
    for form, name in forms.items():
        row = found[name]
        ratios = [first["median_s"] / row["median_s"], row["extra_mib"] / first["extra_mib"]]
        assert row["median_s"] == median(row["seconds"])
        expected[form] = [row["median_s"], row["extra_mib"], *ratios]
    assert not wrong_in(rows_of("docs/kernels.md", "backend", "seconds"), expected)
    for form, name in forms.items():
        expected[form][1:1] = [min(found[name]["seconds"]), max(found[name]["seconds"])]
    assert not wrong_in(rows_of("bench/records/loss-cpu/README.md", "backend", "seconds"), expected)


def test_the_host_of_the_loss():
    shares = []
    for row in rows_of_all("bench/records/host-cpu/README.md", "call", "versions"):
        call, versions, operator, direct, ratio, quartiles = row
        name = "record.json" if "2.14" in versions else "record-torch-2.11.json"
        times = read(f"host-cpu/{name}")["seconds"][call]
        assert says(operator, 1e6 * median(times["operator"]))
        assert says(direct, 1e6 * median(times["direct"]))
        each = sorted(one / other for one, other in zip(times["direct"], times["operator"], strict=True))
        assert says(ratio, median(each))
        low, high = quartiles.split(" to ")
        assert each[0] <= float(low) <= float(ratio) <= float(high) <= each[-1]
        shares += [median(each)] if call == "loss" else []
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"takes the host {min(shares):.2f} to {max(shares):.2f} of\nthe operator's time" in page


def test_the_step_on_a_cpu():
    names = {"encoders alone": "encoder", "plain loop (always float32)": "plain", "MoCo v2": "moco", "SynCo": "synco"}
    found = {name: by(read(f"step-cpu/{name}.json")["results"], "subject") for name in ("bf16", "fp32")}
    for encoders, step, middle, span, alone, plain, memory in rows_of_all(
        "bench/records/step-cpu/README.md", "encoders"
    ):
        rows = found["bf16" if encoders == "bf16" else "fp32"]
        row = rows[names[step]]
        assert says(middle, row["median"])
        assert span == f"{min(row['images_per_second']):.1f} to {max(row['images_per_second']):.1f}"
        assert says(alone, row["median"] / rows["encoder"]["median"])
        assert says(plain, row["median"] / rows["plain"]["median"])
        assert says(memory, row["peak_mib"])
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    ratios = {name: rows["synco"]["median"] / rows["plain"]["median"] for name, rows in found.items()}
    assert f"trains {ratios['bf16']:.2f} times as many images per second" in page
    assert f"In float32 the ratio is {ratios['fp32']:.2f}\n" in page


def test_pipelines_on_a_cpu():
    found = by(read("data-cpu/record.json")["results"], "pipeline")
    first = found["pil"]["processor_milliseconds"]
    names = {
        "pil": "pil",
        "torchvision": "torchvision",
        "torchvision, packed": "torchvision-packed",
        "torchvision, with simplejpeg": "torchvision",
        "torchvision, with simplejpeg, packed": "torchvision-packed",
        "dali, CPU backend": "dali",
        "dali, CPU backend, packed": "dali-packed",
    }
    for page, column in (("docs/data.md", "CPU ms"), ("bench/records/data-cpu/README.md", "CPU ms per image")):
        rows = rows_of(page, "pipeline", column)
        times = {name: found[names[name]]["processor_milliseconds"] for name in rows}
        assert not wrong_in(rows, {name: [time, first / time] for name, time in times.items()})


def test_parts_of_the_pipelines():
    found = read("data-cpu/parts.json")["parts"]
    inside = {"brightness", "contrast", "saturation", "hue"}
    found = {
        name: parts | {"all": sum(time for part, time in parts.items() if part not in inside)}
        for name, parts in found.items()
    }
    for page in ("docs/data.md", "bench/records/data-cpu/README.md"):
        for part, cells in rows_of(page, "part", "pil").items():
            key = "round" if part.startswith("conversion") else part.removeprefix("of it, ")
            for cell, name in zip(cells, ("pil", "torchvision", "dali"), strict=True):
                assert says(cell, found[name][key]) if cell else key not in found[name], (page, part, name)


def test_the_loss_of_quality_of_packs():
    packs = {quality: read(f"data-cpu/pack-{quality}.json") for quality in (90, 95)}
    for page in ("docs/data.md", "bench/records/data-cpu/README.md"):
        rows = rows_of(page, "pack", "bytes")
        expected = {"source": [100, 100 * packs[90]["loss_of_quality"]["small_source"]]}
        for quality, pack in packs.items():
            lost = pack["loss_of_quality"]
            assert (pack["short_side"], pack["quality"]) == (320, quality)
            size, small = 100 * pack["bytes_packed"] / pack["bytes_read"], 100 * lost["small"]
            expected[f"--short-side 320 --quality {quality}"] = [
                size,
                lost["mean"],
                lost["worst"],
                lost["largest"],
                small,
            ]
        assert not wrong_in(rows, expected)


def test_generated_pairs():
    record = read("generated-pairs/record.json")
    pairs = {
        "none": "none",
        "none, SynCo's negatives": "none-synco",
        "frozen pair": "frozen",
        "joint pair": "joint",
        "joint pair, SynCo's negatives": "joint-synco",
    }
    figures = {"kNN, k 20": "knn", "kNN, k 200": "knn_200", "linear probe": "linear"}
    fractions = ("0.1", "0.2", "1")

    def values(fraction, pair, figure):
        return [100 * value for value in record["results"][fraction][pairs[pair]][figure]["values"]]

    found = tables(RECORDS / "generated-pairs" / "README.md")
    means = [rows for header, rows in found if header == ("pair", "10%", "20%", "100%")]
    for rows, figure in zip(means, figures.values(), strict=True):
        for pair, *cells in rows:
            for cell, fraction in zip(cells, fractions, strict=True):
                each = values(fraction, pair, figure)
                assert cell == f"{mean(each):.1f} ± {stdev(each):.1f}"
    ((_, rows),) = [table for table in found if table[0][2:3] == ("minus",)]
    for figure, pair, other, *cells in rows:
        for cell, fraction in zip(cells, fractions, strict=True):
            both = (values(fraction, name, figures[figure]) for name in (pair, other))
            each = [one - less for one, less in zip(*both, strict=True)]
            assert cell == f"{mean(each):+.1f} ± {stdev(each):.1f}"


def test_the_demo_of_the_readme():
    """The box that the demo prints, and the spread of the recorded runs."""
    record, study = read("demo/record.json"), read("demo/study.json")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    waits = f"{record['data_wait']:.0%} of the time waiting for data"
    for name, text in {
        "kNN before": f"{record['knn_before']:.1%}",
        "kNN after": f"{record['knn_after']:.1%}",
        "effective rank": f"{record['feature_rank']:.1f}",
        "images per second": f"{record['images_per_second']:.0f} ({waits})",
        "training time": f"{record['training_seconds']:.0f} s, {record['steps']} steps",
        "checkpoint": record["checkpoint"],
    }.items():
        assert re.search(rf"│ {name} +│ {re.escape(text)} +│", page), name
    ends = [value for row in study["rows"] for value in row["figures"]["kNN in training"]["by_seed"].values()]
    begins = [value for row in study["rows"] for value in row["untrained"]["by_seed"].values()]
    assert len(ends) == 20
    page = " ".join(page.split())
    assert f"begin at {min(begins):.0%}".replace("%", "") + f" to {max(begins):.0%}".replace("%", " %") in page
    assert f"end at {100 * min(ends):.1f} to {100 * max(ends):.0f} %" in page
