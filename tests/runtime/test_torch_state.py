"""What a run sets in PyTorch for the whole process, and what the caller finds afterwards."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from synco_fast.runtime.precision import Precision
from synco_fast.runtime.torch_state import torch_state_kept
from synco_fast.training.step import parallel

CUDNN, GPU = torch.backends.cudnn, torch.device("cuda")


@pytest.fixture
def _first_settings():
    """PyTorch's own at the end; the flag of the older interface sets convolutions and recurrent networks."""
    yield
    torch.backends.fp32_precision = CUDNN.fp32_precision = "none"
    CUDNN.allow_tf32 = True


def formats():
    return CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision


SETTINGS = {
    "all ieee": (torch.backends, "fp32_precision", "ieee"),
    "all tf32": (torch.backends, "fp32_precision", "tf32"),
    "cuDNN ieee": (CUDNN, "fp32_precision", "ieee"),
    "convolutions ieee": (CUDNN.conv, "fp32_precision", "ieee"),
    "recurrent ieee": (CUDNN.rnn, "fp32_precision", "ieee"),
    "older on": (CUDNN, "allow_tf32", True),
    "older off": (CUDNN, "allow_tf32", False),
}


@pytest.mark.usefixtures("_first_settings")
@pytest.mark.parametrize("setting", SETTINGS)
def test_tf32_is_the_runs_choice_and_then_the_callers(setting):
    place, name, value = SETTINGS[setting]
    setattr(place, name, value)
    before = formats()
    with torch_state_kept():
        assert formats() == before
        for chosen, expected in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
            Precision(chosen, GPU)
            assert formats() == (expected, expected)
            assert CUDNN.allow_tf32 == (expected == "tf32"), "PyTorch raises where the two interfaces differ"
    assert formats() == before
    with torch_state_kept():
        pass
    assert formats() == before


@pytest.mark.usefixtures("_first_settings")
def test_what_no_run_has_changed_follows_a_general_setting():
    with torch_state_kept():
        Precision("fp32", torch.device("cpu"))
    torch.backends.fp32_precision = "ieee"
    reached = formats()
    torch.backends.fp32_precision = "none"
    with torch_state_kept():
        Precision("fp32", torch.device("cpu"))
    torch.backends.fp32_precision = "ieee"
    assert formats() == reached


def modes():
    made = torch.tensor(0.5)
    return made.dtype, made.device.type, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recording", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_modes_of_the_caller_end_at_a_run(dtype, recording, device):
    first = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with recording(), torch.device(device):
            before = modes()
            with torch_state_kept():
                assert modes() == (torch.float32, "cpu", True, False)
                assert not torch.zeros(1).is_inference()
            with pytest.raises(KeyError), torch_state_kept():
                raise KeyError
            assert modes() == before
            assert before[:2] == (dtype, device)
    finally:
        torch.set_default_dtype(first)
    assert modes() == (first, "cpu", True, False)


def test_a_default_device_set_for_good_is_as_before():
    torch.set_default_device("meta")
    try:
        with torch_state_kept():
            assert modes()[1] == "cpu"
        assert modes()[1] == "meta"
    finally:
        torch.set_default_device(None)
    assert modes()[1] == "cpu"


def test_the_random_state_of_every_gpu_is_as_before(monkeypatch):
    """`torch.manual_seed`, which a training step calls, seeds all of them."""
    states = {number: torch.tensor(number) for number in range(3)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    monkeypatch.setattr(
        torch.cuda, "manual_seed_all", lambda seed: states.update(dict.fromkeys(states, torch.tensor(seed)))
    )
    drawn, before = torch.get_rng_state(), dict(states)
    with torch_state_kept():
        torch.manual_seed(7)
        assert [int(state) for state in states.values()] == [7, 7, 7]
    assert states == before
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("before", [True, False])
def test_a_job_on_gpus_does_not_warn_of_the_stream_that_it_gives_ddp(before, monkeypatch):
    """PyTorch compares the stream of DDP's hooks, made for a capture, with that of the step."""
    warns, change = (
        torch._C._warn_on_accumulate_grad_stream_mismatch,
        torch._C._set_warn_on_accumulate_grad_stream_mismatch,
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(parallel, "DistributedDataParallel", lambda module, **settings: module)
    try:
        change(before)
        with torch_state_kept():
            parallel.on_all_processes(torch.nn.Linear(1, 1), GPU, processes=2)
            assert not warns()
        assert warns() == before
    finally:
        change(True)
