"""Checks a dashboard against Grafana's schema, with Grafana's own SDK.

Usage: dashboard.py FILE

The SDK drops keys that are not in the schema, so keys that it does not return are invalid; its
annotations define the types of all others.
"""

import enum
import json
import sys
import typing

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard
from typeguard import TypeCheckError, check_type


def missing(ours, theirs, path):
    """Yields differences of `theirs` from `ours`; the SDK adds defaults."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if key not in theirs:
                yield f"{path}.{key}: the schema does not know it"
            else:
                yield from missing(value, theirs[key], f"{path}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs)):
            yield from missing(one, other, f"{path}[{index}]")
    elif ours != theirs or isinstance(ours, bool) != isinstance(theirs, bool):
        yield f"{path}: {ours!r} is {theirs!r} to the schema"


def member(value, hint):
    """Converts `value` to a member of the enumeration in `hint`, if any: the SDK does not."""
    for kind in (hint, *typing.get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            try:
                return kind(value)
            except ValueError:
                pass
    return value


def mistyped(value, path):
    """Yields attributes whose type is not the one that the SDK declares."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from mistyped(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from mistyped(item, f"{path}.{key}")
    elif type(value).__module__.startswith("grafana_foundation_sdk"):
        hints = typing.get_type_hints(type(value))
        for name, item in vars(value).items() if hints else ():
            if name in hints:
                try:
                    check_type(member(item, hints[name]), hints[name])
                except TypeCheckError as error:
                    yield f"{path}.{name}: {error}"
            yield from mistyped(item, f"{path}.{name}")


def main(path):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    ours = json.loads(text)
    errors = []
    if text != json.dumps(ours, indent=2, ensure_ascii=False) + "\n":
        errors.append("not formatted as json.dumps(..., indent=2, ensure_ascii=False) does it")
    register_default_plugins()
    dashboard = Dashboard.from_json(ours)
    errors += missing(ours, json.loads(JSONEncoder(sort_keys=True).encode(dashboard)), "dashboard")
    errors += mistyped(dashboard, "dashboard")
    known = {unit for unit in vars(units).values() if isinstance(unit, str)}
    for panel in ours["panels"]:
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "none")
        if unit not in known:
            errors.append(f"panel {panel['title']}: no such unit: {unit}")
    print("\n".join(errors) or f"{len(ours['panels'])} panels")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
