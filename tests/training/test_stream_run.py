"""A run on a stream, with its kNN on images from elsewhere."""

import pytest

from synco_fast.data.sources.open import open_source
from synco_fast.data.sources.pack import PackSettings, pack_source
from synco_fast.evaluation.context import EvalOptions, source_of
from synco_fast.export.load import read_weights
from synco_fast.runtime.errors import DataError

from ..support.training import assert_identical, newest, pretrain, stop_after, trainer


def test_a_run_on_a_stream_resumes_where_it_stopped(tiny, image_folder, tmp_path):
    pack_source(open_source(str(image_folder)), tmp_path / "pack", PackSettings(shard_bytes=9000), workers=0)
    stream = f"stream:file://{tmp_path}/pack/train/*.tar"
    config = tiny({"data.source": stream, "data.shuffle_buffer": 8, "evaluation.source": str(image_folder)})
    whole = pretrain(config, tmp_path / "whole")
    assert (whole.steps, whole.source) == (8, stream)
    assert whole.knn_after is not None
    assert whole.chance == pytest.approx(1 / 3)
    trainer(config, tmp_path / "parts", after_step=stop_after(3)).run()
    pretrain(config, tmp_path / "parts", resume=tmp_path / "parts")
    assert_identical(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert source_of(read_weights(tmp_path / "whole"), EvalOptions()) == str(image_folder)


def test_a_stream_alone_has_no_images_to_evaluate_on(tiny, image_folder, tmp_path):
    for changes, says in (
        ({}, r"found no held-out split in stream:.* for kNN; --evaluation\.source SOURCE takes other images, --eval"),
        (
            {"evaluation.every": 0, "data.fraction": 0.5},
            "a stream, expected a source with random access for data.fraction",
        ),
    ):
        with pytest.raises(DataError, match=says):
            trainer(
                tiny({"data.source": f"stream:{image_folder}/a.tar", "data.images": 64, **changes}), tmp_path / "run"
            )
