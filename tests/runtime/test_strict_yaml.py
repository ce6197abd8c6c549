"""YAML from outside: bounded, no key twice, errors with line and column."""

import pytest
import yaml

from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.strict_yaml import parse_yaml, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", r"line 3, column 1: found the key 'a' a second time"),
        ("a: {b: 1, b: 2}", r"line 1, column 11: found the key 'b' a second time"),
        ("a: &x [*x]", r"line 1, column 8: found \*x inside &x"),
        ("a: &x {b: *x}", r"found \*x inside &x"),
        ("[" * 2000, r"line 1, column 33: found more than 32 levels"),
        ("{" * 100, r"line 1, column 33: found more than 32 levels"),
        (BOMB, r"line 5, column \d+: found more than 10,000 values"),
        ("- 1\n" * 10_001, r"found more than 10,000 values"),
        ("a: !!python/object/apply:os.system [ls]", r"line 1, column 4: could not determine a constructor"),
        ("a: [1", r"line 1, column 6: expected ',' or '\]'"),
        ("a:\tb\n\t- c", r"line \d, column \d+: found character '\\t'"),
        ("x\x00", r"line 1, column 2: special characters are not allowed"),
        ("? [1, 2]\n: 3", r"line 1, column 3: found list as a key"),
        ("a: 2020-99-99", r"line 1, column 4: month must be in 1\.\.12"),
        ("a: " + "9" * 5000, r"line 1, column 4: Exceeds the limit"),
        ("a: !!bool maybe", r"line 1, column 4: found no bool behind its tag"),
        ("a: 1\nb: !!int ''", r"line 2, column 4: found no int behind its tag"),
        ("a: !!timestamp soon", r"line 1, column 4: found no timestamp behind its tag"),
        ("a: &x {<<: *x}", r"line 1, column 12: found \*x inside &x"),
        ("{a: !!float x}", r"line 1, column 5: could not convert string to float"),
        ("--- a\n--- b", r"line 2, column 1: found another document"),
        ("a: *nope", r"found undefined alias"),
        ("x" * ((1 << 20) + 1), r"found more than 1,048,576 bytes"),
    ],
)
def test_what_is_refused_is_one_line_with_its_place(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_yaml(text, "config: f.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config: f.yaml")


def test_plain_data_is_that_of_pyyaml():
    text = "a: &x [1, 2.5, true, null, text]\nb: *x\nc: {d: 'e', <<: {f: 1}}\n"
    assert parse_yaml(text, "here") == yaml.safe_load(text)


def test_numbers_in_scientific_notation_are_numbers():
    assert parse_yaml("[1e-3, 1.5e3, -2E+2, 5, 1_000]", "here") == [0.001, 1500.0, -200.0, 5, 1000]
    assert parse_yaml("[1e, e3, 1e3x]", "here") == ["1e", "e3", "1e3x"]


def test_files(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    for name, says in (
        ("none.yaml", "cannot read"),
        ("latin.yaml", "cannot read"),
        ("twice.yaml", r"twice\.yaml, line 2"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_yaml(tmp_path / name)
