"""Configuration for people: every key with its meaning, and errors that name the nearest key."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

__all__ = ["explain_config", "explain_error", "known_keys", "nearest_key", "nearest_name"]

#: Pydantic's errors about one bound; the message gives the whole range instead.
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
#: Its errors about what is no number.
_NUMBERS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = 8


def explain_config(config: BaseModel) -> str:
    """A configuration as YAML, each key with a comment: meaning, range, and default where it differs.

    Args:
        config: Its sections may be models too, one level deep.
    """
    lines: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            about = (type(value).__doc__ or "").splitlines()[0].replace("`", "")
            lines += ["", f"# {about}", f"{name}:"]
            dumped = value.model_dump(mode="json")
            for key, inner in type(value).model_fields.items():
                lines.append(f"  {key}: {_flow(dumped[key])}  # {_comment(inner, getattr(value, key))}")
        else:
            lines.append(f"{name}: {_flow(config.model_dump(mode='json')[name])}  # {_comment(field, value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf).removesuffix("...\n").strip()
    )


def _comment(field: FieldInfo, value: Any) -> str:
    default = field.get_default(call_default_factory=True)
    values = range_in_words(field)
    text = (field.description or "") + (f" ({values})" if values else "")
    if value != default:
        text += f"; default {_flow(list(default) if isinstance(default, tuple) else default)}"
    return text.strip("; ")


def range_in_words(field: FieldInfo) -> str:
    """The range of a key in words; empty for text and booleans."""
    words = [words for words in _kinds(field.annotation, tuple(field.metadata)) if words]
    return " or ".join(dict.fromkeys(words)) if words != ["null"] else ""


def _kinds(kind: Any, limits: tuple[Any, ...]) -> Iterator[str]:
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *more = get_args(kind)
        yield from _kinds(inner, (*limits, *more))
    elif origin in (Union, types.UnionType):
        for inner in get_args(kind):
            yield from _kinds(inner, limits)
    elif origin is Literal:
        yield ", ".join(map(str, get_args(kind)))
    elif origin is tuple:
        inner = next(_kinds(get_args(kind)[0], limits), "")
        yield f"{len(get_args(kind))} numbers" + (f", each {inner}" if inner else "")
    elif kind is type(None):
        yield "null"
    elif kind in (int, float):
        low, high = bounds(limits)
        if low[0] is not None and high[0] is not None and low[1] and high[1]:
            yield f"{_shown(low[0])} to {_shown(high[0])}"
        else:
            yield ", ".join(filter(None, (_bound(low, "{} or more", "above {}"), _bound(high, "up to {}", "below {}"))))


Bound = tuple[float | None, bool]
"""A limit, None for no limit, and whether it is inclusive."""


def bounds(limits: tuple[Any, ...]) -> tuple[Bound, Bound]:
    """The lower and the upper bound that a number's annotations set."""
    low: Bound = (None, True)
    high: Bound = (None, True)
    for limit in limits:
        inside = limit.metadata if isinstance(limit, FieldInfo) else [limit]
        for one in inside:
            if isinstance(one, annotated_types.Ge | annotated_types.Gt):
                low = (_number(one.ge), True) if isinstance(one, annotated_types.Ge) else (_number(one.gt), False)
            if isinstance(one, annotated_types.Le | annotated_types.Lt):
                high = (_number(one.le), True) if isinstance(one, annotated_types.Le) else (_number(one.lt), False)
    return low, high


def _number(bound: Any) -> float:
    return bound if isinstance(bound, int) else float(bound)


def _bound(bound: Bound, closed: str, opened: str) -> str:
    value, inside = bound
    return "" if value is None else (closed if inside else opened).format(_shown(value))


def _shown(value: float | None) -> str:
    return f"{value:,.0f}" if value is not None and abs(value) >= 1 and value == int(value) else f"{value:g}"


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key by its dotted name."""
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def nearest_key(dotted: str, model: type[BaseModel]) -> str:
    """The nearest key, as the end of a sentence; empty if none is near."""
    keys = known_keys(model)
    sections = sorted({key.partition(".")[0] for key in keys if "." in key})
    last = dotted.rpartition(".")[2].replace("-", "_")
    # Whole words count before letters: batch-size is training.batch, although augment.size shares more of its letters.
    words = [word for word in last.split("_") if len(word) > 2]
    names = difflib.get_close_matches(last, {key.rpartition(".")[2] for key in keys}, n=1, cutoff=0.85) + words
    same = next((found for name in names if (found := [key for key in keys if key.rpartition(".")[2] == name])), [])
    near = difflib.get_close_matches(dotted, same, n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(dotted, keys, n=1, cutoff=0.75)
    near = near or difflib.get_close_matches(dotted, sections if "." not in dotted else keys, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(dotted, keys, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def nearest_name(word: str, names: Iterable[str]) -> str:
    """The nearest of some names, as the end of a sentence; empty if none is near."""
    near = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _field_of(loc: tuple[int | str, ...], model: type[BaseModel]) -> FieldInfo | None:
    field = None
    for part in loc:
        found = model.model_fields.get(str(part))
        if found is None:
            break
        field = found
        if isinstance(found.annotation, type) and issubclass(found.annotation, BaseModel):
            model = found.annotation
    return field


def explain_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem in one line: the key, what was found, what is expected."""
    first = error.errors(include_url=False)[0]
    dotted = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
    if first["type"] == "extra_forbidden":
        inner = first["input"]
        deeper = f"{dotted}.{next(iter(inner))}" if isinstance(inner, dict) and inner else dotted
        others = "" if "." in dotted else f", expected one of {', '.join(model.model_fields)}"
        return f"{dotted}: found an unknown key{nearest_key(deeper, model) or others}"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{dotted}.{message}" if dotted else message
    said = first["msg"].replace("Input should be ", "")
    if first["type"] == "model_type":
        said = f"a section with keys{nearest_key(f'{dotted}.name', model)}"
    elif first["type"] == "truth" and (field := _field_of(first["loc"], model)) and range_in_words(field):
        # YAML reads yes, no, on and off as true and false.
        said = range_in_words(field)
    elif first["type"] == "literal_error":
        said += nearest_name(str(first["input"]), re.findall(r"'([^']+)'", said))
    elif first["type"] in _NUMBERS:
        said = _NUMBERS[first["type"]]
        if isinstance(first["loc"][-1], str) and (field := _field_of(first["loc"], model)):
            said += f", {range_in_words(field)}"
    elif first["type"] in _BOUNDS and (field := _field_of(first["loc"], model)):
        said = range_in_words(field)
    return f"{dotted}: found {_SHORT.repr(first['input'])}, expected {said}"
