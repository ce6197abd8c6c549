"""Two machines, as two network namespaces with a cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.rotation import in_turn

from ..support.job import WORKER

#: From the block for documentation (RFC 5737), so that no real network is shadowed.
ADDRESSES = ("192.0.2.1", "192.0.2.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts():
    """The names of two namespaces that reach each other and nothing else."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    names = [f"synco{os.getpid()}{side}" for side in "ab"]
    cables = [f"sf{os.getpid() % 100000}{side}" for side in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
                ip("link", "set", cable, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
                for device in (cable, "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield list(zip(names, cables, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


@pytest.mark.slow
@in_turn(0, 2)
def test_a_job_over_two_machines(hosts, tiny, tmp_path):
    config = tiny({"training.batch": 16, "training.max_steps": 3, "evaluation.every": 0, "optimizer.lr": 0.03})
    (tmp_path / "job.yaml").write_text(config.to_yaml())
    processes = []
    for rank, (host, cable) in enumerate(hosts):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": cable,
        }
        given = f"{{'VARIABLES': {variables!r}, 'FOLDER': Path({str(tmp_path)!r}), 'RESUME': False, 'ACT': ''}}"
        program = f"import runpy; from pathlib import Path; runpy.run_path({str(WORKER)!r}, {given})"
        command = ["ip", "netns", "exec", host, sys.executable, "-c", program]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], [Path(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(one["queue.rows"], other["queue.rows"])
    assert (one["queue.image_ids"] >= 0).sum() == 32
