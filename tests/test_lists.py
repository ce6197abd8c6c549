"""Every list of names has one source, and what else names its entries agrees with it."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch

from synco_fast import commands
from synco_fast.bench import norm, subjects
from synco_fast.cli import _parser
from synco_fast.commands import COMMANDS
from synco_fast.export.formats import FORMATS
from synco_fast.kernels.backends import BACKENDS, Backend
from synco_fast.methods import METHODS
from synco_fast.runtime.phases import PHASES

ROOT = Path(__file__).resolve().parents[1]
#: Modules of `synco_fast.commands` that are no subcommand.
HELPERS = {"evaluations", "options", "overrides", "parser", "tables", "validate_norm"}


def test_every_export_format_is_written_and_documented():
    for name in FORMATS:
        assert callable(importlib.import_module(f"synco_fast.export.formats.{name}").write)
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(FORMATS)


def test_backends_are_those_of_the_operator_and_are_measured():
    assert set(get_args(Backend)) == {"auto", *BACKENDS}
    assert set(BACKENDS) <= set(subjects.BACKENDS)


def test_every_norm_runs_or_says_why_not():
    from synco_fast.bench.norm_model import Layer

    cpu, layer = torch.device("cpu"), Layer(8, 3, 3, relu=True, residual=True)
    for subject in set(subjects.NORMS) - {"compiled"}:
        reason = norm.unavailable(subject, cpu, torch.float32)
        if reason is None:
            gradients = norm.prepare_norm(subject, layer, 4, 2, cpu, torch.float32)()
            assert gradients[0].shape == (4, 8, 3, 3)
        else:
            assert subject in reason or "CUDA" in reason


def test_every_phase_of_a_step_is_one_that_a_profile_shows():
    found = set()
    for file in (ROOT / "synco_fast").rglob("*.py"):
        found |= set(re.findall(r'\bphase\("([^"]+)"\)', file.read_text(encoding="utf-8")))
    assert found == set(PHASES)


def test_every_method_is_a_module_that_builds():
    for spec in METHODS.values():
        assert callable(importlib.import_module(f"synco_fast.methods.{spec.module}").build)


def test_every_module_of_commands_is_a_subcommand():
    found = {module.name for module in pkgutil.iter_modules(commands.__path__)} - HELPERS
    assert found == {module.__name__.rpartition(".")[2] for module in COMMANDS}
    assert len(COMMANDS) == len(set(COMMANDS))


#: What the project once called a backend, grayscale, a subcommand, corrupt images, to skip, and what is expected.
OLD_WORDS = re.compile(
    r"back[- ]ends?\b|\bgrey|\bverbs?\b|\bbroken image|\b(leav\w+|left) out\b|found [^\"\n]+, allowed", re.I
)


def test_old_words_stay_gone():
    files = [
        file for folder in ("synco_fast", "kernels", "data", "bench", "docs") for file in (ROOT / folder).rglob("*")
    ]
    read = [*files, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile"))]
    assert all(
        map(OLD_WORDS.search, ("a back end", "greyscale", "broken images", "steps left out", "found 3, allowed 2"))
    )
    for file in read:
        known = file.suffix in (".py", ".md", ".sh", ".html", "") and file.is_file() and "records" not in file.parts
        if known and file.name != "migrations.py":
            found = OLD_WORDS.search(file.read_text(encoding="utf-8"))
            assert not found, f"{file.relative_to(ROOT)}: {found and found[0]}"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_every_option_of_every_subcommand_is_explained():
    found = list(parsers(_parser()))
    assert len(found) > len(COMMANDS)
    for parser in found:
        assert "%%" not in parser.format_help(), parser.prog
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), f"{parser.prog} {action.dest}"


def test_every_help_page_fits_80_columns_and_its_example_parses(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for parser in parsers(_parser()):
        page = parser.format_help()
        assert not [line for line in page.splitlines() if len(line) > 80], parser.prog
        for example in re.findall(r"example:\n((?:.*\\\n)*.*)", page):
            line = re.sub(r"\s*\\\n\s*", " ", example)
            words = re.sub(r"^torchrun .*?-m synco_fast", "synco-fast", line.strip()).split()
            options, rest = _parser().parse_known_args(words[1:])
            assert options.overrides or not rest, line


def test_the_help_of_pretrain_generator_names_every_key():
    from synco_fast.commands.pretrain_generator import KEYS
    from synco_fast.explain import known_keys
    from synco_fast.generated.config import GeneratorConfig

    assert list(KEYS) == known_keys(GeneratorConfig)


def test_colours_and_shared_options_are_written_once():
    for pattern, folders, home in (
        (r"#0072B2", ("synco_fast", "bench"), "synco_fast/runtime/style.py"),
        (r"(?m)^_OPTIONS\b|\"--(json|precision|device)\"", ("synco_fast",), "synco_fast/commands/options.py"),
    ):
        read = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
        files = [file for file in read if re.search(pattern, file.read_text(encoding="utf-8"))]
        assert [file.relative_to(ROOT).as_posix() for file in files] == [home]


def test_files_and_bars_are_made_in_one_place():
    own = {"runtime/progress.py"}
    for file in (ROOT / "synco_fast").rglob("*.py"):
        name = file.relative_to(ROOT / "synco_fast").as_posix()
        text = file.read_text(encoding="utf-8")
        assert name in own or "rich.progress" not in text, name
        assert "safe_load(" not in text, name
