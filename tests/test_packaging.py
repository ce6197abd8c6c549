"""What is built and shipped: wheel, source distribution, metadata, container file."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.support.layout import ROOT


def run(*words: str | Path, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, from a copy, since building writes into the folder."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed: the files to build from are not known")
    copy = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("no git checkout: the files to build from are not known")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    run(sys.executable, "setup.py", "--quiet", "sdist", cwd=copy)
    (found,) = (copy / "dist").glob("synco_fast-*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the source distribution alone."""
    folder = tmp_path_factory.mktemp("wheel")
    words = ("-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, *words, sdist, cwd=folder)
    (found,) = folder.glob("synco_fast-*.whl")
    return found


def test_the_sdist_holds_what_a_reader_and_a_packager_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["docs/kernels.md", "examples/plain_pytorch.py", "bench/gpu.sh", "tests/conftest.py", "CITATION.cff"]
    wanted += ["docs/mkdocs.yml", "docs/report-curves.png", "examples/pretrain.ipynb"]
    assert not [name for name in [*wanted, "constraints.txt", "CHANGELOG.md", "Makefile"] if name not in names]
    # Pages and tests that are shipped read the records and the workflow.
    whole = run("git", "ls-files", "bench/records", ".github", ".ci", "tests", cwd=ROOT).splitlines()
    assert not [name for name in whole if name not in names and (ROOT / name).is_file()]
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "runs/"))]


def test_the_wheel_takes_one_name_and_no_tests_or_studies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"synco_fast"}
    assert "synco_fast/py.typed" in names
    assert "synco_fast/report/page.html" in names
    assert "synco_fast/kernels/triton/launch.py" in names
    assert not [name for name in names if "tests" in name or "experiments" in name or "records" in name]


def test_metadata_are_ready_for_a_package_index(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
    assert metadata["Version"] == "0.1.0"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_all("Project-URL")
    assert metadata["Keywords"]
    needs = metadata.get_all("Requires-Dist") or ()
    assert any(need.startswith("pip>=") and 'extra == "dev"' in need for need in needs), "the tests run python -m pip"
    assert {"Programming Language :: Python :: 3.13", "Typing :: Typed"} <= set(metadata.get_all("Classifier") or ())
    body = metadata.get_payload()
    assert isinstance(body, str)
    assert "make demo" in body
    # Links into the checkout would be dead on an index, and pictures in it missing.
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", body)
    assert "![" not in body
    assert "demo run in its report" not in body
    dated = re.search(r"^## (\S+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert dated is not None
    assert dated[1] == metadata["Version"]


@pytest.mark.slow
def test_the_installed_wheel_pretrains_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """Three steps in an environment whose only distribution of synco-fast is the wheel."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    # The dependencies of this environment, whose own .pth files (the editable install) are not read from there.
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(paths), encoding="utf-8")
    words = ("-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", "--ignore-installed")
    run(sys.executable, *words, wheel, cwd=tmp_path)
    assert "synco-r50-200" in run(tmp_path / "env" / "bin" / "synco-fast", "presets", cwd=tmp_path)
    command = (
        "import runpy, sys, synco_fast, synco_fast.kernels\n"
        "assert all(module.__file__.startswith(sys.prefix) for module in (synco_fast, synco_fast.kernels))\n"
        "runpy.run_module('synco_fast', run_name='__main__')"
    )
    settings = ("--training.max_steps", "3", "--data.workers", "0", "--evaluation.every", "0", "--out", "run")
    run(python, "-c", command, "pretrain", "--config", "demo", *settings, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_container_installs_every_requirement() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    required = re.findall(
        r'^ {8}"([a-z0-9]+)[^"]*",$', setup[setup.index("install_requires") : setup.index("extras_")], re.M
    )
    assert "torch" in required
    assert not [
        name for name in required if name not in ("torch", "torchvision") and not re.search(rf"\b{name}\b", text)
    ]


def test_the_workflow_and_the_citation_are_of_this_version() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["versions"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert jobs["versions"]["strategy"]["matrix"]["torch"] == ["2.11", "2.14"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    scope: dict[str, str] = {}
    exec((ROOT / "synco_fast" / "version.py").read_text(encoding="utf-8"), scope)
    assert citation["version"] == scope["__version__"]
