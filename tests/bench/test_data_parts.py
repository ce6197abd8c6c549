"""CPU time of the data pipelines by part."""

import numpy as np
import pytest
import torch

from synco_fast.bench import data_parts
from synco_fast.bench.data import make_photos
from synco_fast.data.augment.draw import JITTER, draw_views
from synco_fast.data.augment.ops import finish_views
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.build import has_dali

RECIPE = Recipe(size=32, solarize_probability=0.2)


def test_the_timed_operations_are_those_of_the_pipelines():
    crops = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    options = {"images": np.arange(24), "views": np.zeros(24, np.int64), "sizes": np.tile([40, 50], (24, 1))}
    drawn = draw_views(RECIPE, seed=0, epoch=0, **options)
    clock = data_parts._Clock()
    for row in range(24):
        crop, view = crops[row : row + 1], drawn[row : row + 1]
        assert torch.equal(data_parts._operations(clock, crop, view), finish_views(crop, view))
    assert clock.spent["jitter"] == pytest.approx(sum(clock.spent[part] for part in JITTER))


@pytest.mark.slow
def test_every_part_of_every_pipeline_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(data_parts, "_TRANSFERS", 14)
    pipelines = [name for name in data_parts.MEASURED if name != "dali" or has_dali()]
    ticks, threads = [], torch.get_num_threads()
    spent = data_parts.measure_parts(
        tmp_path,
        make_photos(tmp_path, 3),
        pipelines=pipelines,
        recipe=RECIPE,
        rounds=1,
        tick=lambda: ticks.append(1),
    )
    assert torch.get_num_threads() == threads
    assert len(ticks) == len(pipelines)
    assert set(spent["torchvision"]) == set(data_parts.PARTS)
    assert set(data_parts.PARTS) - set(spent["pil"]) == {"read", "draw", *JITTER}
    for name in pipelines:
        assert list(spent[name]) == [part for part in data_parts.PARTS if part in spent[name]]
        # DALI's time to crop is the difference of two runs.
        measured = ("decode", "jitter", "blur") + (("crop",) if name != "dali" else ())
        assert all(spent[name][part] > 0 for part in measured)
    if has_dali():
        assert set(data_parts.PARTS) - set(spent["dali"]) == {"collate"}
