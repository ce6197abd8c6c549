import numpy as np
import pytest
import torch

import synco_fast
from synco_fast.evaluation.context import EvalOptions
from synco_fast.evaluation.embed import embed
from synco_fast.runtime.errors import ConfigError, DataError


def test_npz_and_parquet_hold_the_same(make_run, tmp_path):
    run = make_run()
    done = embed(run, tmp_path / "features.npz", EvalOptions(workers=0))
    assert (done["images"], done["width"], done["labelled"]) == (45, 16, 45)
    found = np.load(tmp_path / "features.npz")
    assert found["features"].shape == (45, 16)
    assert found["features"].dtype == np.float32
    assert found["labels"].tolist()[:12] == [0] * 11 + [1]
    assert found["splits"].tolist() == ["train"] * 33 + ["val"] * 12
    assert found["paths"][0].endswith("train/class0/0.jpg")

    parquet = pytest.importorskip("pyarrow.parquet")
    embed(run, tmp_path / "features.parquet", EvalOptions(workers=0), splits="val")
    table = parquet.read_table(tmp_path / "features.parquet")
    assert table.column_names == ["features", "label", "path", "split"]
    assert np.array_equal(np.stack(table["features"].to_numpy()), found["features"][33:])
    assert table["path"].to_pylist() == found["paths"][33:].tolist()


def test_images_without_labels(make_run, image_folder, tmp_path):
    run = make_run()
    folder = image_folder / "train" / "class0"
    (folder / "broken.jpg").write_bytes(b"")
    done = embed(run, tmp_path / "features.npz", EvalOptions(data=str(folder), workers=0))
    assert (done["images"], done["labelled"], done["corrupt"]) == (11, 0, 1)
    found = np.load(tmp_path / "features.npz")
    assert set(found["labels"].tolist()) == {-1}
    features = torch.from_numpy(found["features"])
    assert features.shape == (11, synco_fast.load_backbone(run).num_features)
    with pytest.raises(DataError, match="found no held-out split"):
        embed(run, tmp_path / "features.npz", EvalOptions(data=str(folder), workers=0), splits="val")


def test_other_endings(make_run, tmp_path):
    with pytest.raises(ConfigError, match=r"out: found 'features\.csv', expected a name that ends in"):
        embed(make_run(), tmp_path / "features.csv")
