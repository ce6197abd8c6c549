"""How many cores a process has: the affinity mask, the quota of a container, and the other ranks on the machine."""

import os

import pytest

from synco_fast.data import workers
from synco_fast.data.augment.recipe import Recipe
from synco_fast.data.pipelines.torchvision import TorchvisionPipeline, evaluation_loader
from synco_fast.data.sources.open import open_source
from synco_fast.data.workers import available_cores, machine_cores
from synco_fast.runtime.distributed import DistEnv

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_PORT": "1"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_NODELIST": "a[1-2]",
    "SLURM_JOB_ID": "7",
    "SLURM_CPUS_ON_NODE": "96",
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Set this process's cores, those of its parent, the job's variables, and the files of the control groups."""
    own = workers._quota

    def make(cores, parent, variables, files=()):
        for name in {*TORCHRUN, *SLURM, "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for name, text in dict(files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(parent if process else cores)))
        monkeypatch.setattr(workers, "_quota", lambda: own(tmp_path))

    return make


@pytest.mark.parametrize(
    ("cores", "parent", "variables", "share"),
    [
        (96, 96, {}, 96),
        (96, 96, {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, 96),
        (96, 96, TORCHRUN, 12),
        (16, 16, TORCHRUN, 2),
        (4, 4, TORCHRUN, 1),
        (12, 96, TORCHRUN, 12),  # a mask of its own
        (48, 96, TORCHRUN, 12),  # the mask of a NUMA node, of which four ranks are
        (96, 128, SLURM, 12),
        (12, 128, SLURM, 12),
        (8, 128, SLURM, 8),
        (96, 128, {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x4)"}, 24),
        (96, 96, {**SLURM, "SLURM_STEP_ID": ""}, 96),
        (96, 96, {**SLURM, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, 96),  # salloc's shell
        (96, 96, {**SLURM, **TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, 24),
    ],
)
def test_the_ranks_of_a_machine_share_its_cores(machine, cores, parent, variables, share):
    machine(cores, parent, variables)
    assert (available_cores(), machine_cores()) == (share, cores)
    assert workers._local_ranks(variables)[0] == DistEnv.detect(variables).local_world


@pytest.mark.parametrize(
    ("files", "cores", "share"),
    [
        ({}, 16, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "600000 100000\n"}, 6, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1, 1),
        (
            {
                "proc/self/cgroup": "0::/pods/one\n",
                "sys/fs/cgroup/pods/one/cpu.max": "max 100000",
                "sys/fs/cgroup/pods/cpu.max": "450000 100000",
            },
            4,
            2,
        ),
        (
            {
                "proc/self/cgroup": "2:memory:/a\n1:cpu,cpuacct:/docker/outside\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "800000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            8,
            4,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\nnonsense\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            16,
            8,
        ),
    ],
)
def test_the_quota_of_a_container_is_shared_too(machine, files, cores, share):
    machine(16, 16, {**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, files)
    assert (machine_cores(), available_cores()) == (cores, share)


def test_the_default_workers_of_all_ranks_are_one_for_each_core(machine, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine(16, 16, TORCHRUN)
    split = open_source(str(image_folder)).train
    made = [TorchvisionPipeline(split, Recipe(size=8), batch=16, seed=0, rank=rank, world=8) for rank in range(8)]
    assert sum(each._loader.workers for each in made) == 16
    assert evaluation_loader(split, Recipe(size=8)).workers == 16, "the other ranks wait"
