"""The command line: dataclass defaults <- TOML preset <- flags, and errors as one line.

Flags and their help come from the dataclasses in `config.py` through tyro. Nothing here imports torch, so that `--help`
and a wrong setting answer at once. Only what the field types of `config.py` need is read from TOML: bool, int, float,
str, Literal, and each of them or None.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import sys
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import tyro

from coars_fast.config import Config
from coars_fast.config_checks import check
from coars_fast.errors import CoarsError, ConfigError, RunFolderError
from coars_fast.state.files import read_json

PRESETS = Path(__file__).parent / "presets"

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """The checked configuration of `python -m coars_fast.train` from `argv` (default: the process's arguments).

    Exits with 0 after `--help` and with 2 at a flag that does not exist or does not parse, as tyro does. Raises
    :class:`ConfigError` for an unknown preset, a malformed one, or settings that `config_checks.check` refuses.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = _flag_value(arguments, "--preset") or Config.preset
    start = dataclasses.replace(load_preset(name), preset=name)
    listing = "\n".join(f"- {preset}: {summary}" for preset, summary in presets().items())
    description = f"{_fold(Config.__doc__ or '')}\n\nPresets:\n{listing}"
    config = parse(Config, arguments, "python -m coars_fast.train", description, default=start)
    check(config)
    return config


def parse(
    cls: type[T], argv: Sequence[str] | None, prog: str, description: str | None = None, *, default: T | None = None
) -> T:
    """`argv` (None: the process's arguments) parsed into the dataclass `cls`; `default` holds what flags then override.

    `description` defaults to the docstring of `cls`. Exits with 0 after `--help` and with 2 at a wrong flag.
    """
    return tyro.cli(
        cls,
        prog=prog,
        description=description or _fold(cls.__doc__ or ""),
        args=list(sys.argv[1:] if argv is None else argv),
        default=default if default is not None else tyro.MISSING_NONPROP,
        registry=_REGISTRY,
    )


def parse_known(cls: type[T], argv: Sequence[str] | None, prog: str) -> tuple[T, list[str]]:
    """:func:`parse`, and the arguments that `cls` does not know."""
    return tyro.cli(
        cls,
        prog=prog,
        description=_fold(cls.__doc__ or ""),
        args=list(sys.argv[1:] if argv is None else argv),
        registry=_REGISTRY,
        return_unknown_args=True,
    )


def flags(config: Config, start: Config) -> list[str]:
    """The flags that turn the settings `start` into `config`; :func:`parse_config` is the inverse."""
    return list(_flags(config, start, ""))


def _flags(config: Any, start: Any, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, before = getattr(config, field.name), getattr(start, field.name)
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _flags(value, before, f"{prefix}{name}.")
        elif value != before:
            if hints[field.name] is bool:
                yield f"--{prefix}{'' if value else 'no-'}{name}"
            else:
                yield from (f"--{prefix}{name}", str(value))


def main_guard(main: Callable[P, R]) -> Callable[P, R]:
    """Decorates a program's `main`: a :class:`CoarsError` becomes one line on stderr and exit status 2, Ctrl-C 130."""

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except CoarsError as error:
            print(f"error: {_printable(_fold(str(error)))}", file=sys.stderr)
            raise SystemExit(2) from error
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return guarded


def _printable(text: str) -> str:
    """`text` with escapes for what could steer a terminal: errors quote files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# Presets ------------------------------------------------------------------------------------------------------------


def presets() -> dict[str, str]:
    """Name -> first comment line of every preset in `coars_fast/presets`."""
    found = {}
    for path in sorted(PRESETS.glob("*.toml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.stem] = first.removeprefix("#").strip()
    return found


def load_preset(name: str) -> Config:
    """The defaults of `config.py` with a preset over them: a name in `coars_fast/presets`, or a TOML file's path."""
    path = PRESETS / f"{name}.toml" if name in presets() else Path(name)
    if not path.is_file():
        raise ConfigError(f"--preset {name}: no such preset or file; presets are {', '.join(presets())}")
    table = read_toml(path)
    if "preset" in table:
        raise ConfigError(f"{path}: preset: a preset cannot name another one; copy its settings")
    return overlay(Config(), table, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file; :class:`ConfigError` if it is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error


# Dictionaries -------------------------------------------------------------------------------------------------------


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain dictionaries, for `config.json`."""
    return dataclasses.asdict(config)


def config_from_dict(table: Mapping[str, Any], source: str = "config.json") -> Config:
    """The inverse of :func:`config_to_dict`. Missing keys take their default; `source` names the file in errors."""
    return overlay(Config(), table, source)


def read_run_config(folder: Path) -> Config:
    """The settings of a run, from its folder.

    Raises:
        RunFolderError: the folder holds no run, or one with settings that this version does not have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise RunFolderError(f"{folder}: no config.json; name the folder of a run")
    try:
        return config_from_dict(read_json(path), str(path))
    except ConfigError as error:
        raise RunFolderError(f"{error}; was the run made by another version of coars_fast?") from error


def overlay(base: T, table: Mapping[str, Any], source: str, prefix: str = "") -> T:
    """`base` (a dataclass) with the values of `table`, each checked against its field's type."""
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        if key not in hints:
            raise ConfigError(f"{source}: {name}: no such setting; {nearest_settings(name)}")
        current = getattr(base, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: {name}: expected a table [{name}], got {value!r}")
            changes[key] = overlay(current, value, source, f"{name}.")
        else:
            changes[key] = _checked(value, hints[key], f"{source}: {name}")
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` if it has the type `hint` (an int is a float, a bool is not an int), otherwise :class:`ConfigError`."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    for option in typing.get_args(hint) if union else (hint,):
        if typing.get_origin(option) is Literal:
            if any(value == choice and type(value) is type(choice) for choice in typing.get_args(option)):
                return value
        elif option is float and type(value) is int:
            return float(value)
        elif type(value) is option:
            return value
    raise ConfigError(f"{where}: expected {_describe(hint)}, got {value!r}")


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if hint is type(None):
        return "nothing"
    if typing.get_args(hint):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    return str(hint.__name__)


def nearest_settings(name: str) -> str:
    """The settings whose names are most like `name`; the last part counts most, as sections are easily confused."""
    names = list(setting_names(Config))
    by_last = {known: known.rpartition(".")[2] for known in names}
    wanted = name.replace("-", "_")
    last = wanted.rpartition(".")[2]
    near = difflib.get_close_matches(wanted, names, n=2, cutoff=0.7)
    near += [known for known in names if by_last[known] == last and known not in near]
    near += [n for n in names if n not in near and difflib.SequenceMatcher(None, by_last[n], last).ratio() > 0.75]
    return f"nearest: {', '.join(near[:3])}" if near else "`--help` lists all of them"


def setting_names(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings below the dataclass `cls`, such as `train.num_steps`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from setting_names(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


# Help ---------------------------------------------------------------------------------------------------------------


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Field -> the string below it in the source of the dataclass `cls`, folded to one line."""
    docs = {}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    for above, below in zip(body.body, body.body[1:], strict=False):
        match above, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = _fold(text)
    return docs


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.struct_rule
def _dataclass_rule(
    info: tyro.constructors.StructTypeInfo,
) -> tyro.constructors.StructConstructorSpec | None:
    """Dataclasses as tyro reads them, but with folded docstrings: tyro keeps the line breaks of indented ones."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = typing.get_type_hints(info.type, include_extras=True)
    docs = field_docs(info.type)
    fields = []
    for field in dataclasses.fields(info.type):
        if dataclasses.is_dataclass(info.default):
            default = getattr(info.default, field.name)
        elif field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = tyro.constructors.MISSING
        fields.append(
            tyro.constructors.StructFieldSpec(
                name=field.name, type=hints[field.name], default=default, helptext=docs.get(field.name)
            )
        )
    return tyro.constructors.StructConstructorSpec(instantiate=info.type, fields=tuple(fields))


def _fold(text: str) -> str:
    return " ".join(text.split())


def _flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of the last `flag value` or `flag=value`; None without one (tyro then reports what is wrong)."""
    value = None
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
        elif argument == flag and position + 1 < len(arguments) and not arguments[position + 1].startswith("-"):
            value = arguments[position + 1]
    return value
