"""First use without a GPU: processes that pass, answer wrongly, raise, crash and hang, and what is kept of them."""

from __future__ import annotations

import json
import signal
import sys
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from synco_fast.cli import main
from synco_fast.kernels import driver
from synco_fast.runtime import first_use
from synco_fast.runtime.first_use import Outcome, Prover, device_facts, forget, key_of, proofs_folder

FACTS = {"device": "Fake H100, 132 multiprocessors", "driver": "1.2", "torch": "9.9", "kernels": "abc"}
#: Acts as the shapes say, and writes down that it was started.
CHILD = """
import json, os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / f"started-{os.getpid()}").touch()
request = json.loads(sys.stdin.readline())
for name, shapes in request["wanted"]:
    act, line = shapes["act"], {"kernel": name, "seconds": 0.1}
    case = {"about": "B = 4", "errors": {"gradient": 3e-7}, "bounds": {"gradient": 1e-6}, "misses": []}
    if act == "wrong":
        case |= {"errors": {"gradient": 0.5}, "misses": ["gradient", "a repeat gives other bits"]}
    elif act == "hang":
        grandchild = subprocess.Popen(["sleep", "60"])
        (folder / "grandchild").write_text(str(grandchild.pid))
        time.sleep(60)
    elif act.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, act))
    elif act == "exit":
        print("warning\\nno such symbol: cuFake", file=sys.stderr)
        sys.exit(3)
    elif act == "chatter":
        print("compiling ...", flush=True)
    elif act.startswith("raise"):
        print(json.dumps(line | {"raised": "RuntimeError: " + act.removeprefix("raise ")}), flush=True)
        break
    print(json.dumps(line | {"compared": [case] if act != "nothing" else []}), flush=True)
"""


@pytest.fixture
def prover(tmp_path):
    """Make a prover whose process acts as the shapes say."""
    (tmp_path / "child.py").write_text(CHILD)

    def make(**changes):
        command = (sys.executable, "-I", str(tmp_path / "child.py"), str(tmp_path))
        settings = {"folder": tmp_path / "proofs", "command": command, "limit": 20.0}
        return Prover("fake:0", FACTS, **{**settings, **changes})

    return make


def acts(**by_kernel):
    return {name: {"act": act} for name, act in by_kernel.items()}


def started(tmp_path):
    return len(list(tmp_path.glob("started-*")))


def test_a_proof_is_made_once_and_says_what_was_compared(prover, tmp_path):
    said = []
    found = prover(say=said.append).prove(acts(loss="pass", norm="pass"))
    assert found == {"loss": Outcome(True, fresh=True), "norm": Outcome(True, fresh=True)}
    assert said == [
        "first use on Fake H100: compiling and validating the fused kernels of loss, norm (at most 20 s each) ..."
    ]
    again = prover(say=said.append, command=("/does/not/exist",)).prove(acts(loss="pass", norm="pass"))
    assert again == {"loss": Outcome(True), "norm": Outcome(True)}
    assert (started(tmp_path), len(said)) == (1, 1)
    records = [json.loads(file.read_text()) for file in (tmp_path / "proofs").iterdir()]
    assert {record["kernel"] for record in records} == {"loss", "norm"}
    for record in records:
        assert record["passed"] is True
        assert (record["facts"], record["shapes"]) == (FACTS, {"act": "pass"})
        assert record["compared"][0]["errors"] == {"gradient": 3e-7}


def test_a_wrong_answer_is_named_and_remembered(prover, tmp_path):
    outcome = prover().prove(acts(loss="wrong"))["loss"]
    assert not outcome.passed
    assert outcome.reason == (
        "differs from PyTorch in gradient, a repeat gives other bits at B = 4; gradient: found an error of 5.0e-01, "
        "expected 1.0e-06 or less"
    )
    again = prover().prove(acts(loss="wrong"))["loss"]
    assert (again.passed, again.fresh) == (False, False)
    assert again.reason.startswith(outcome.reason)
    assert again.reason.endswith("'synco-fast validate --forget' empties the cache)")
    assert started(tmp_path) == 1


@pytest.mark.parametrize(
    ("act", "reason", "kept"),
    [
        ("SIGSEGV", "the subprocess was killed by SIGSEGV", True),
        ("SIGKILL", "the subprocess was killed by SIGKILL", False),
        ("exit", "the subprocess exited with code 3: no such symbol: cuFake", True),
        ("raise PTXAS error:\n  line 3", "RuntimeError: PTXAS error: line 3", True),
        ("raise CUDA out of memory. Tried", "RuntimeError: CUDA out of memory. Tried", False),
        ("chatter", "the subprocess printed 'compiling ...'", True),
        ("nothing", "nothing was compared", True),
    ],
)
def test_a_failure_is_that_of_its_own_kernel_alone(prover, tmp_path, act, reason, kept):
    found = prover().prove(acts(momentum="pass", loss=act, norm="pass"))
    assert found["momentum"].passed
    assert found["norm"].passed
    assert (found["loss"].passed, found["loss"].reason) == (False, reason)
    assert len(list((tmp_path / "proofs").iterdir())) == 2 + kept
    assert started(tmp_path) == (1 if act == "nothing" else 2)


def test_what_hangs_is_ended_with_all_that_it_started(prover, tmp_path):
    begun = time.monotonic()
    found = prover(limit=1.0).prove(acts(loss="hang"))
    assert found["loss"].reason == "no answer within 1 s"
    assert time.monotonic() - begun < 30
    pid = int((tmp_path / "grandchild").read_text())
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except OSError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the process that it started is still there")


def test_a_process_that_cannot_be_started(prover, tmp_path):
    found = prover(command=("/does/not/exist",)).prove(acts(loss="pass"))["loss"]
    assert found.reason.startswith("the subprocess did not start")
    assert not (tmp_path / "proofs").exists()


def test_a_proof_is_one_of_its_device_versions_and_shapes():
    shapes = {"calls": [[256, False]], "length": 65536}
    keys = {
        key_of("loss", shapes, FACTS),
        key_of("norm", shapes, FACTS),
        key_of("loss", {**shapes, "length": 1}, FACTS),
    }
    keys |= {key_of("loss", shapes, {**FACTS, name: "other"}) for name in FACTS}
    assert len(keys) == 3 + len(FACTS)
    assert key_of("loss", shapes, FACTS) == key_of("loss", dict(reversed(shapes.items())), dict(FACTS))


def test_a_damaged_proof_is_made_anew_and_a_place_that_takes_none_is_named(prover, tmp_path):
    prover().prove(acts(loss="pass"))
    (file,) = (tmp_path / "proofs").iterdir()
    for text in ("{", '{"passed": "yes", "reason": ""}'):
        file.write_text(text)
        assert prover().prove(acts(loss="pass"))["loss"].fresh
    (tmp_path / "file").touch()
    said = []
    assert prover(folder=tmp_path / "file", say=said.append).prove(acts(loss="pass"))["loss"].passed
    assert "first use: the result for loss cannot be cached" in said[-1]


def test_forget(prover, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert proofs_folder() == tmp_path / "cache" / "synco-fast" / "proofs"
    assert forget() == 0
    prover(folder=None).prove(acts(loss="pass", norm="wrong"))
    assert main(["validate", "--forget"]) == 0
    assert f"removed 2 cached results from {proofs_folder()}" in capsys.readouterr().out
    assert prover(folder=None).prove(acts(loss="pass"))["loss"].fresh


def test_the_facts_of_a_device(monkeypatch, tmp_path):
    properties = SimpleNamespace(name="Fake H100", multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    facts = device_facts(0)
    assert facts["device"] == "Fake H100, 132 multiprocessors"
    assert facts["capability"] == "9.0"
    assert facts["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in facts.values())
    assert {"driver", "cuda", "triton", "synco-fast", "kernels"} <= facts.keys()
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\nGCC version: 13.3.0\n")
    assert first_use._driver(file) == "580.65.06"


@pytest.mark.parametrize(("library", "said"), [(13010, "CUDA 13.1"), (12080, "CUDA 12.8"), (None, "unknown")])
def test_a_driver_without_its_module_s_version_is_known_by_its_library(monkeypatch, tmp_path, library, said):
    """In a virtual machine's or a container's /proc; two drivers must not share a result."""

    class Library:
        def __init__(self, name):
            assert name == "libcuda.so.1"
            if library is None:
                raise OSError(f"{name}: cannot open shared object file")

        def cuDriverGetVersion(self, version):
            version._obj.value = library
            return 0

    monkeypatch.setattr(driver.ctypes, "CDLL", Library)
    driver.driver_version.cache_clear()
    try:
        assert first_use._driver(tmp_path / "none") == said
    finally:
        driver.driver_version.cache_clear()


def test_the_process_dies_with_its_run(monkeypatch):
    """SIGTERM ends a run that validates: the process, in a session of its own, would keep the GPU for minutes."""
    from synco_fast.kernels import proof

    asked = []
    libc = SimpleNamespace(prctl=lambda *words: asked.append(("prctl", *words)))
    monkeypatch.setattr(proof.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(proof.os, "dup2", lambda *numbers: None)
    monkeypatch.setattr(proof.signal, "alarm", lambda seconds: asked.append(("alarm", seconds)))
    monkeypatch.setattr(sys, "stdin", StringIO('{"device": "cpu", "wanted": [], "seconds": 90}\n'))
    proof.main()
    assert asked == [("prctl", 1, signal.SIGKILL), ("alarm", 90)], "before it reads, so that none is missed"


def test_kernels_themselves_in_the_interpreter(tmp_path, monkeypatch):
    """The very process that a run starts, on shapes that an interpreter gets through in no time."""
    pytest.importorskip("triton")
    from synco_fast.kernels import Negatives
    from synco_fast.kernels.proof import augment_shapes, loss_shapes, momentum_shapes

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings = {"temperature": 0.2, "dtype": torch.bfloat16, "negatives": [Negatives.moco()]}
    wanted = {
        "momentum": momentum_shapes([torch.empty(70, 3), torch.empty(5), torch.empty(5)], 0.99),
        "loss": loss_shapes(calls=[(2, False)], length=40, dim=16, **settings),
        "augment": augment_shapes(
            sides=[8], views=4, dtype=torch.bfloat16, image=(9, 12), channels=3, planar=False, sigma=0.5
        ),
    }
    prover = Prover("cpu", FACTS, folder=tmp_path)
    assert prover.prove(wanted) == {name: Outcome(True, fresh=True) for name in wanted}
    records = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert sorted(case["about"] for record in records for case in record["compared"]) == [
        "4 views of 8 pixels from images of 9 x 12, 3 channels interleaved, bfloat16",
        "B = 2, K = 40, D = 16, N = 0, 0 synthetic, bfloat16, flat",
        "B = 2, K = 40, D = 16, N = 0, 0 synthetic, bfloat16, peaked",
        "m = 0.5, 3 tensors of 220 numbers in all, float32",
        "m = 0.99, 3 tensors of 220 numbers in all, float32",
    ]
