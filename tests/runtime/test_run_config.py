"""``config.yaml`` of a run: whole, or refused with what to do."""

from __future__ import annotations

import pytest

from synco_fast.config import build_config
from synco_fast.generated.config import GeneratorConfig
from synco_fast.runtime.checkpoint import save_checkpoint
from synco_fast.runtime.errors import CheckpointError, ConfigError
from synco_fast.runtime.run_config import holds_run, read_run_config, write_run_config

CONFIG = build_config({}, {"data.source": "somewhere\u2026", "training.epochs": 7})


@pytest.fixture
def file(tmp_path):
    write_run_config(tmp_path, CONFIG.to_yaml())
    return tmp_path / "config.yaml"


def refused(folder, command: str = "pretrain") -> str:
    with pytest.raises(ConfigError) as caught:
        read_run_config(folder, command)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read(file):
    assert build_config(read_run_config(file.parent)) == CONFIG
    inode = file.stat().st_ino
    write_run_config(file.parent, CONFIG.to_yaml())
    assert file.stat().st_ino == inode, "the same is not written again"
    write_run_config(file.parent, build_config({}).to_yaml())
    assert build_config(read_run_config(file.parent)) == build_config({})
    assert [path.name for path in file.parent.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("command", ["pretrain", "pretrain-generator"])
def test_cut_at_the_end_of_a_line_it_is_refused(tmp_path, command):
    """Missing keys would train with their defaults."""
    config = CONFIG if command == "pretrain" else GeneratorConfig()
    write_run_config(tmp_path, config.to_yaml())
    whole = (tmp_path / "config.yaml").read_text().splitlines(keepends=True)
    assert read_run_config(tmp_path, command)
    for lines in (*range(0, len(whole) - 1, 9), len(whole) - 3, len(whole) - 2):
        (tmp_path / "config.yaml").write_text("".join(whole[:lines]))
        said = refused(tmp_path, command)
        assert "config: found " in said
        assert said.endswith(": start over, by --config with --continue or another --out")
    (tmp_path / "config.yaml").write_text("".join(whole[:-1]))
    assert read_run_config(tmp_path, command), "whole but for the checksum, as older versions wrote it"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "found nothing in"),
        (b"- 1\n- 2\n", "found list in"),
        (b"text", "found str in"),
        (b"\x00\xff\x89PNG", "cannot read"),
        (b"seed: 3\n\tdata: 4\n", "line 2, column 1: found character '\\t'"),
        (b"seed: !!python/object/apply:os.system [ls]\n", "line 1, column 7: could not determine a constructor"),
        (b"seed: 1\nseed: 2\n", "line 2, column 1: found the key 'seed' a second time"),
    ],
)
def test_what_it_is_not(file, content, says):
    file.write_bytes(content)
    said = refused(file.parent)
    assert says in said
    assert str(file) in said


def test_a_line_changed_or_lost_is_refused_and_says_how_to_change_a_setting(file):
    text = file.read_text()
    for changed in (text.replace("epochs: 7", "epochs: 8"), text.replace("  epochs: 7\n", "")):
        assert changed != text
        file.write_text(changed)
        assert "its checksum differs), expected changes as --section.key VALUE with --resume" in refused(file.parent)


def test_another_commands_run(file):
    assert refused(file.parent, "pretrain-generator").endswith("expected one of pretrain-generator")
    write_run_config(file.parent, GeneratorConfig().to_yaml())
    assert "found one of another command" in refused(file.parent)


def test_without_the_file_the_newest_checkpoint_has_the_settings(tmp_path):
    assert not holds_run(tmp_path)
    assert "found no run in" in refused(tmp_path)
    state = {"config": CONFIG.model_dump(mode="json")}
    save_checkpoint(tmp_path / "checkpoints", 3, state, keep=2)
    save_checkpoint(tmp_path / "checkpoints", 4, state, keep=2)
    (tmp_path / "checkpoints" / "step-00000004.pt").write_bytes(b"")
    assert holds_run(tmp_path)
    assert build_config(read_run_config(tmp_path)) == CONFIG
    said = refused(tmp_path / "checkpoints" / "step-00000003.pt")
    assert said.endswith(f"expected the folder of its run: {tmp_path}")
    (tmp_path / "config.yaml").write_text("")
    assert refused(tmp_path).endswith(": remove it, and its settings are taken from the newest checkpoint")
    (tmp_path / "config.yaml").unlink()
    save_checkpoint(tmp_path / "checkpoints", 5, {}, keep=2)
    with pytest.raises(CheckpointError, match="found no settings in it, and no config"):
        read_run_config(tmp_path)
