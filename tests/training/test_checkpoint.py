import errno
import resource
import zipfile
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from synco_fast.runtime.checkpoint import (
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    load_optimizer,
    load_weights,
    save_checkpoint,
    set_aside,
)
from synco_fast.runtime.errors import CheckpointError
from tests.support.runs import Bomb


def test_the_newest_are_kept(tmp_path):
    for step in (1, 5, 20, 100_000_000_000):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-100000000000.pt", "step-00000020.pt"]
    assert not list(tmp_path.glob(".*"))
    state, path, problems = find_checkpoint(tmp_path)
    assert (state["step"], path.name, problems) == (100_000_000_000, "step-100000000000.pt", [])


def test_a_checkpoint_that_a_run_replaces_meanwhile_is_no_damaged_one(tmp_path, monkeypatch):
    """An evaluation of a run that trains, with `training.keep` at 1: reading takes seconds."""
    save_checkpoint(tmp_path, 4, {}, keep=1)

    def load(path):
        if path.name == "step-00000004.pt":
            save_checkpoint(tmp_path, 8, {}, keep=1)
        return load_checkpoint(path)

    monkeypatch.setattr("synco_fast.runtime.checkpoint.load_checkpoint", load)
    state, path, problems = find_checkpoint(tmp_path)
    assert (state["step"], path.name, problems) == (8, "step-00000008.pt", [])


def test_a_later_file_is_none_of_those_that_are_kept(tmp_path):
    """A run that starts below a damaged checkpoint keeps what it writes; the damaged one can be set aside."""
    for step in (4, 8):
        save_checkpoint(tmp_path, step, {}, keep=2)
    (tmp_path / "step-00000008.pt").write_bytes(b"damaged")
    assert save_checkpoint(tmp_path, 6, {}, keep=1).exists()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000008.pt", "step-00000006.pt"]
    assert [path.name for path in set_aside(tmp_path, 6)] == ["step-00000008.pt"]
    assert find_checkpoint(tmp_path)[2] == [], "it is not tried first"
    save_checkpoint(tmp_path, 8, {}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008.pt", "step-00000008.pt.damaged"]


@contextmanager
def full_disk(room: int):
    """No file of this process may grow beyond ``room`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("how", ["full", "error"])
def test_a_write_that_fails_leaves_the_older_one_and_says_what_room_it_needs(tmp_path, monkeypatch, how):
    folder = tmp_path / "run" / "checkpoints"
    save_checkpoint(folder, 1, {"x": torch.ones(3)}, keep=1)
    (folder / ".step-00000002.99-aa.pt").write_bytes(b"of a process that was killed")

    def fail(state, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    if how == "error":
        monkeypatch.setattr(torch, "save", fail)
    with full_disk(1 << 16), pytest.raises(CheckpointError) as caught:
        save_checkpoint(folder, 2, {"x": torch.ones(1 << 20), "again": [torch.ones(1 << 19)]}, keep=1)
    said = str(caught.value)
    assert "step-00000002.pt: found no way to write it (" in said
    assert "expected space for 6.0 MiB, of which " in said
    assert said.endswith(
        f"the newest good checkpoint is step-00000001.pt: free some space, then --resume {tmp_path / 'run'}"
    )
    state, _, problems = find_checkpoint(folder)
    assert (state["step"], problems) == (1, [])
    assert [path.name for path in folder.iterdir()] == ["step-00000001.pt"]
    monkeypatch.setattr(torch, "save", lambda *_: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="must match the size"):  # what is no matter of room stays what it is
        save_checkpoint(folder, 3, {}, keep=1)


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path, where):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.ones(1000), "y": torch.zeros(1000)}, keep=2)
    newest = tmp_path / "step-00000002.pt"
    content = bytearray(newest.read_bytes())
    first = content.index(b"\x00\x00\x80\x3f" * 100)
    place = first + int(where * 4000) // 4 * 4
    content[place] ^= 1
    newest.write_bytes(content)
    assert torch.load(newest)["x"].ne(1).sum() == 1, "PyTorch reads it"
    state, path, problems = find_checkpoint(tmp_path)
    assert (state["step"], path.name) == (1, "step-00000001.pt")
    assert "found a file that is cut short or damaged (the checksum of " in problems[0]


def test_compressed_records_are_refused(tmp_path):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(1000)}, keep=2)
    file = tmp_path / "step-00000001.pt"
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="compressed records"):
        load_checkpoint(file)


def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.ones(1000)}, keep=2)
    newest = tmp_path / "step-00000002.pt"
    newest.write_bytes(newest.read_bytes()[:900])
    state, path, problems = find_checkpoint(tmp_path)
    assert (state["step"], path.name) == (1, "step-00000001.pt")
    assert len(problems) == 1
    assert "cut short or damaged" in problems[0]
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_checkpoint(newest)
    newest.write_bytes(bytes(900))  # as a file system leaves it after a power failure; tarfile takes it for an archive
    with pytest.raises(CheckpointError, match=r"cut short or damaged \(no file of torch.save\)"):
        load_checkpoint(newest)


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save({"format": 1, "step": 1, "x": Bomb()}, tmp_path / "step-00000001.pt")
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_checkpoint(tmp_path / "step-00000001.pt")


def test_what_is_no_checkpoint(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="found no synco-fast checkpoint"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="found no file"):
        load_checkpoint(tmp_path / "none.pt")
    (tmp_path / "words.pt").write_text("hello: 1\n")
    with pytest.raises(CheckpointError, match=r"words\.pt: found no file of torch\.save, expected a checkpoint"):
        load_checkpoint(tmp_path / "words.pt")
    with pytest.raises(CheckpointError, match="found no file or run folder"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="found none in"):
        find_checkpoint(tmp_path)


def test_another_architecture_is_named(tmp_path):
    model = nn.Linear(3, 2)
    with pytest.raises(
        CheckpointError, match=r"other shapes in weight, bias: weight is \(5, 3\), the model's \(2, 3\)"
    ):
        load_weights(model, nn.Linear(3, 5).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match="another architecture than the model: it lacks bias"):
        load_weights(model, {"weight": model.weight}, tmp_path)
    with pytest.raises(CheckpointError, match="it has besides extra"):
        load_weights(model, {**model.state_dict(), "extra": torch.ones(1)}, tmp_path)
    with pytest.raises(CheckpointError, match="it holds str instead of a tensor in bias"):
        load_weights(model, {**model.state_dict(), "bias": "text"}, tmp_path)
    with pytest.raises(CheckpointError, match="found list for the weights"):
        load_weights(model, [], tmp_path)


def test_another_dtype_is_refused_where_a_run_resumes_and_cast_where_weights_are_imported(tmp_path):
    model = nn.BatchNorm1d(3)
    half = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"other dtypes in .*weight is torch.float16, the model's torch.float32"):
        load_weights(model, half, tmp_path)
    load_weights(model, half, tmp_path, cast=True)
    assert model.weight.dtype == torch.float32
    counter = {**model.state_dict(), "num_batches_tracked": torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match=r"num_batches_tracked is torch\.float32"):
        load_weights(model, counter, tmp_path, cast=True)


def stepped(kind, parameter, **settings):
    """An optimizer after a step, as a run on a CPU leaves it."""
    optimizer = kind([parameter], lr=0.1, **settings)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_an_optimizer_of_a_cpu_goes_on_on_a_gpu_and_back(tmp_path, kind):
    """``step`` lies where the own optimizer keeps it, whatever the saved settings say; meta stands for a GPU."""
    state = stepped(kind, nn.Parameter(torch.ones(4, 4)), fused=False, capturable=False).state_dict()
    there = nn.Parameter(torch.empty(4, 4, device="meta"))
    optimizer = kind([there], lr=0.1, capturable=True)
    load_optimizer(optimizer, state, tmp_path)
    assert {value.device.type for value in optimizer.state[there].values()} == {"meta"}
    assert optimizer.param_groups[0]["capturable"]
    assert state["param_groups"][0]["capturable"] is False, "the state is not changed"
    state["param_groups"][0].update(fused=True, capturable=True)
    here = nn.Parameter(torch.ones(4, 4))
    optimizer = kind([here], lr=0.1, fused=False, capturable=False)
    load_optimizer(optimizer, state, tmp_path)
    assert optimizer.state[here]["step"] == 1
    here.grad = torch.ones(4, 4)
    optimizer.step()


def test_momentum_takes_the_memory_layout_of_its_parameter(tmp_path):
    """As ``training.channels_last`` changes it; fused SGD refuses another one."""
    plain = nn.Parameter(torch.randn(4, 3, 2, 2))
    last = nn.Parameter(plain.detach().to(memory_format=torch.channels_last))
    saved = stepped(torch.optim.SGD, plain, momentum=0.9)
    optimizer = torch.optim.SGD([last], lr=0.1, momentum=0.9)
    load_optimizer(optimizer, saved.state_dict(), tmp_path)
    momentum = optimizer.state[last]["momentum_buffer"]
    assert momentum.stride() == last.stride() != plain.stride()
    assert torch.equal(momentum, saved.state[plain]["momentum_buffer"])
    assert saved.state[plain]["momentum_buffer"].stride() == plain.stride(), "the state is not changed"
