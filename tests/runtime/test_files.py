"""JSON and outputs: what is damaged or cannot be written is one line, before anything long begins."""

import errno
import io

import pytest
import torch

from synco_fast.runtime.environment import describe_environment
from synco_fast.runtime.errors import UserError
from synco_fast.runtime.files import atomic_write, check_writable, read_json, write_json


def test_json_comes_back_and_a_missing_file_is_empty(tmp_path):
    write_json(tmp_path / "below" / "a.json", {"x": [1, None, "ü"]})
    assert read_json(tmp_path / "below" / "a.json") == {"x": [1, None, "ü"]}
    assert read_json(tmp_path / "none.json") == {}
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"{", "cannot be read"), (b"\xff", "cannot be read"), (b"[1]", "found list"), (b"[" * 100_000, "cannot be read")],
)
def test_damaged_json_is_one_line(tmp_path, content, says):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "deep" / "a.json", "json", file=True)
    assert not (tmp_path / "new").exists(), "nothing is made"
    for path, says in (
        (tmp_path / "file" / "a.json", "which is a file, expected a folder"),
        ("/proc/a.json", "expected a place where this user can write"),
        (tmp_path, "found a folder"),
    ):
        with pytest.raises(UserError, match=says):
            check_writable(type(tmp_path)(path), "json", file=True)
    with pytest.raises(UserError, match=r"out: found a file .*file, expected a folder"):
        check_writable(tmp_path / "file", "out")


def test_the_source_trees_commit_is_found():
    """This checkout is one, or an installed copy that has none."""
    from pathlib import Path

    inside = (Path(__file__).resolve().parents[2] / ".git").exists()
    assert ("commit" in describe_environment()) == inside


def test_the_device_is_the_one_that_was_measured(monkeypatch):
    """A run on the CPU of a machine with a GPU names the CPU."""
    processor = describe_environment(torch.device("cpu"))["device"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    assert describe_environment(torch.device("cpu"))["device"] == processor
    assert describe_environment(torch.device("cuda", 1))["device"] == "GPU cuda:1"
    assert describe_environment()["device"] == "GPU None"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("unexpected pos 128 vs 0"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_whatever_a_library_raises(tmp_path, monkeypatch, error):
    """torch.save and safetensors hide the system's reason; an open file has it without its name."""

    class Full(io.RawIOBase):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    if isinstance(error, RuntimeError):
        monkeypatch.setattr(type(tmp_path), "open", lambda *args, **kwargs: Full())
    with pytest.raises(OSError, match="No space left on device") as caught, atomic_write(tmp_path / "a.pt"):
        raise error
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.pt"))


def test_an_error_that_is_not_the_disks_stays_itself(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a.pt") as temporary:
        temporary.write_bytes(bytes(1 // 0))
    assert not [*tmp_path.iterdir()]
