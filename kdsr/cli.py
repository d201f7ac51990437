"""From a command line to a validated config, and from an error to a sentence and an exit code.

Knows every config class equally; loads neither torch nor ray. Environment variables are not read: a field
`name` must never be filled from $NAME. A field is a flag, with hyphens or underscores, and has the other
names that its `kdsr.config.Flags` gives it.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from kdsr.config import Flags
from kdsr.errors import KdsrError, RequestError

Config = TypeVar("Config", bound=BaseModel)

EXIT_OK, EXIT_FAILED, EXIT_BAD_REQUEST, EXIT_INTERRUPTED = 0, 1, 2, 130


def parse(config_class: type[Config], argv: Sequence[str]) -> Config:
    """The config that `argv` asks for: `--config FILE.yaml`, then `--section.field value` over it.

    The order of the arguments does not matter, flags always win. `--help` prints every field and exits,
    `--schema` prints the JSON schema for editors and exits. Raises RequestError with one clause for each
    field that is wrong; a misspelt one is answered with the nearest right name.
    """
    flags = {flag.path: flag for flag in _flags(config_class)}
    argv = _spelled(flags.values(), argv)
    arguments = vars(_parser(config_class, flags.values()).parse_args(argv))
    if arguments.pop("schema"):
        print(json.dumps(config_class.model_json_schema(), indent=2))
        raise SystemExit(EXIT_OK)
    content = _read_yaml(arguments.pop("config"))
    given = {name: flags[name].read(texts) for name, texts in arguments.items()}
    _forget_other_kinds(config_class, content, given)
    for name, value in given.items():
        _put(content, name, value)
    try:
        return config_class.model_validate(content)
    except ValidationError as error:
        raise RequestError(_explain(config_class, error)) from None


def main(config_class: type[Config], run: Callable[[Config], int]) -> NoReturn:
    """Parse, run, and leave with an exit code that tells the truth: 0 done, 1 failed, 2 bad request."""
    try:
        code = run(parse(config_class, sys.argv[1:]))
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_BAD_REQUEST
    except KdsrError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        print("stopped by the user; the same command goes on from here", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.stdout.flush()
    sys.exit(code)


# ---------------------------------------------------------------- flags


@dataclass(frozen=True)
class Flag:
    """One `--section.field`: what it takes and what its field says of itself."""

    path: str
    annotation: Any
    description: str
    default: str
    aliases: tuple[str, ...] = ()
    """Other names of the flag, with their hyphens."""

    @property
    def is_boolean(self) -> bool:
        """Whether the bare flag already means true."""
        return bool in _members(self.annotation)

    @property
    def is_repeated(self) -> bool:
        """Whether every use of the flag adds one element."""
        return get_origin(self.annotation) is tuple

    def read(self, texts: list[str]) -> Any:
        """The value that `texts`, one for each use of the flag, ask for. Later uses win, or are added."""
        if self.is_repeated:
            return [value for text in texts for value in self._read_elements(text)]
        if NoneType in _members(self.annotation) and texts[-1].lower() in {"none", "null"}:
            return None
        return texts[-1] if _accepts_text(self.annotation) else _read_scalar(self.path, texts[-1])

    def _read_elements(self, text: str) -> list[Any]:
        if _accepts_text(get_args(self.annotation)[0]):
            return [text]
        elements = _read_scalar(self.path, text if text.startswith("[") else f"[{text}]")
        return list(elements)

    def help(self) -> str:
        """Docstring of the field and its default."""
        return f"{self.description} ({self.default})".strip().replace("%", "%%")

    def metavar(self) -> str:
        """What kind of value the flag takes."""
        names = [_type_name(member) for member in _members(self.annotation) if member is not NoneType]
        return "|".join(dict.fromkeys(names))


class _HelpFormatter(argparse.HelpFormatter):
    """Names what a flag takes once, not after each of its names."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) < 2 or action.nargs == 0:
            return super()._format_action_invocation(action)
        takes = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {takes}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; --help lists the flags")


def _parser(config_class: type[BaseModel], flags: Iterable[Flag]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python {os.path.relpath(sys.argv[0])}" if sys.argv[0] else "kdsr",
        usage="%(prog)s [--config FILE.yaml] [--field VALUE] [--section.field VALUE] ...",
        description=config_class.__doc__,
        formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=30, width=100),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", action="append", help="fields from a YAML file; flags win over it"
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema and exit")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in flags:
        section = flag.path.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "fields")
        _add_flag(groups[section], flag)
    return parser


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    shared: dict[str, Any] = {"dest": flag.path, "action": "append", "default": argparse.SUPPRESS}
    # `--use_gpu`, `--use_gpu false` and `--no-use_gpu` all mean what they say.
    optional: dict[str, Any] = {"nargs": "?", "const": "true"} if flag.is_boolean else {}
    names = [*sorted(flag.aliases, key=len), f"--{flag.path}"]
    group.add_argument(*names, metavar=flag.metavar(), help=flag.help(), **shared, **optional)
    if flag.is_boolean:
        off: dict[str, Any] = {**shared, "action": "append_const", "const": "false"}
        group.add_argument(f"--no-{flag.path}", help=argparse.SUPPRESS, **off)


def _flags(model: type[BaseModel], prefix: str = "") -> list[Flag]:
    """Every leaf field once; fields that several members of a union share become one flag."""
    found: dict[str, Flag] = {}
    for name, field in model.model_fields.items():
        path, models = prefix + name, _models_in(field.annotation)
        nested = [flag for member in models for flag in _flags(member, f"{path}.")]
        for flag in nested or [_flag(path, field)]:
            found[flag.path] = _merged(found[flag.path], flag) if flag.path in found else flag
        if f"{path}.kind" in found and len(models) > 1:
            default = _show(field, lambda value: value.kind)
            found[f"{path}.kind"] = replace(found[f"{path}.kind"], default=default)
    return list(found.values())


def _flag(path: str, field: FieldInfo) -> Flag:
    description = " ".join((field.description or "").split())
    aliases = tuple(name for flags in field.metadata if isinstance(flags, Flags) for name in flags.names)
    return Flag(path, _plain(field.annotation), description, _show(field, _dumped), aliases)


def _merged(one: Flag, other: Flag) -> Flag:
    if one.annotation != other.annotation:
        one = replace(one, annotation=Union[one.annotation, other.annotation])  # noqa: UP007
    return one if one.default == other.default else replace(one, default="default depends on kind")


def _spelled(flags: Iterable[Flag], argv: Sequence[str]) -> list[str]:
    """`argv` with each flag as the parser knows it. Raises RequestError for a flag that nobody knows."""
    known = {name: name for name in ("--help", "-h", "--config", "--schema")}
    for flag in flags:
        known.update({name: name for name in (f"--{flag.path}", *flag.aliases)})
        if flag.is_boolean:
            known[f"--no_{flag.path}"] = f"--no-{flag.path}"
    return [_spelled_one(known, argument) for argument in argv]


def _spelled_one(known: Mapping[str, str], argument: str) -> str:
    name, equals, value = argument.partition("=")
    dashes = "--" if name.startswith("--") else "-"
    bare = name.removeprefix(dashes).replace("-", "_")
    if not name.startswith("-") or not bare[:1].isalpha():
        return argument
    if dashes + bare in known:
        return f"{known[dashes + bare]}{equals}{value}"
    # `-s4` is a short flag and its value, but `-scale 4` must not become `-s cale`.
    if dashes == "-" and name[:2] in known and f"--{bare}" not in known:
        return argument
    hint = _nearest(bare, _bare_names(known, negated=bare.startswith("no_")))
    if dashes == "-" and not hint.startswith("did"):
        hint = f"a value that begins with a hyphen is given as --FLAG={argument}; {hint}"
    raise RequestError(f"unknown flag {name}; {hint}")


def _bare_names(known: Mapping[str, str], *, negated: bool) -> dict[str, str]:
    """What each flag is called without its hyphens and without its section, and the flag."""
    wanted = [flag for flag in known.values() if negated or not flag.startswith("--no-")]
    whole = {flag.lstrip("-"): flag for flag in wanted}
    return {name.rpartition(".")[2]: flag for name, flag in whole.items()} | whole


# ---------------------------------------------------------------- values


def _read_scalar(path: str, text: str) -> Any:
    """`text` as the YAML file would read it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise RequestError(f"--{path}: {text!r} cannot be read; write it as in the YAML file") from None


def _read_yaml(paths: Sequence[str] | None) -> dict[str, Any]:
    if not paths:
        return {}
    if len(paths) > 1:
        raise RequestError(f"--config may be given once, found {' and '.join(paths)}; put them into one file")
    path = paths[0]
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RequestError(f"config {path}: expected fields with names at the top, found {content!r:.60}")
    return content


def _put(content: dict[str, Any], path: str, value: Any) -> None:
    """Set one dotted path, making the sections on the way."""
    *sections, name = path.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise RequestError(f"--{path}: {section} in the YAML file is {content!r:.60}, not a section")
    content[name] = value


def _forget_other_kinds(
    config_class: type[BaseModel], content: dict[str, Any], given: Mapping[str, Any]
) -> None:
    """When a flag changes the kind of a union, drop the file's fields that only the old kind has."""
    for path in [path for path in given if path.rpartition(".")[2] == "kind"]:
        section, models = _section(config_class, content, path.split(".")[:-1])
        kinds = {_kind(model): model for model in models}
        old, new = kinds.get(str(section.get("kind"))), kinds.get(given[path])
        if old and new:
            for name in old.model_fields.keys() - new.model_fields.keys():
                section.pop(name, None)


def _section(
    config_class: type[BaseModel], content: dict[str, Any], parts: Sequence[str]
) -> tuple[dict[str, Any], list[type[BaseModel]]]:
    """The part of `content` at `parts` and the models that it may hold."""
    for part in parts:
        inner = content.get(part)
        content = inner if isinstance(inner, dict) else {}
    return content, _models_at(config_class, parts)


# ---------------------------------------------------------------- annotations


def _plain(annotation: Any) -> Any:
    """`annotation` without its Annotated wrappers at the top."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _members(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation alone."""
    annotation = _plain(annotation)
    if get_origin(annotation) in {Union, UnionType}:
        return [inner for member in get_args(annotation) for inner in _members(member)]
    return [annotation]


def _accepts_text(annotation: Any) -> bool:
    """Whether any text may be a value, so that it must not be read as a number or a list."""
    return any(
        member is str or (get_origin(member) is Literal and isinstance(get_args(member)[0], str))
        for member in _members(annotation)
    )


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Models that a field holds itself, not those inside its lists."""
    found = _members(annotation)
    return [member for member in found if isinstance(member, type) and issubclass(member, BaseModel)]


def _kind(model: type[BaseModel]) -> str | None:
    """The tag of a member of a union."""
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        elements = [element for element in get_args(annotation) if element is not Ellipsis]
        if _models_in(elements[0]):
            return "[{kind: ...}, ...]"
        return ",".join(_type_name(_plain(element)) for element in elements)
    if get_origin(annotation) is dict:
        return "{NAME: ...}"
    return {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false"}.get(annotation, str(annotation))


def _show(field: FieldInfo, form: Callable[[Any], Any]) -> str:
    """The default of a field, in `form`, as the YAML file would hold it."""
    if field.is_required():
        return "required"
    plain = form(field.default)
    return f"default {plain if isinstance(plain, str) else 'not set' if plain is None else json.dumps(plain)}"


def _dumped(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {name: _dumped(element) for name, element in value.items()}
    return [_dumped(element) for element in value] if isinstance(value, tuple) else value


# ---------------------------------------------------------------- errors


def _nearest(name: str, known: Mapping[str, str]) -> str:
    """A hint that names what is known under the name closest to `name`."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {known[close[0]]}?" if close else "--help lists those that exist"


def _models_at(config_class: type[BaseModel], parts: Sequence[str | int]) -> list[type[BaseModel]]:
    """Models that may stand at `parts`: names of fields, positions in lists, keys, kinds of unions."""
    models: list[type[BaseModel]] = [config_class]
    for position, part in enumerate(parts):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if _is_key(config_class, parts[: position + 1]):
            continue
        if fields:
            models = [inner for field in fields for inner in _models_below(field.annotation)]
        elif isinstance(part, str):
            models = [model for model in models if _kind(model) == part]
    return models


def _is_key(config_class: type[BaseModel], parts: Sequence[str | int]) -> bool:
    """Whether the last of `parts` is a name that a person chose, in a field that maps names to models."""
    if len(parts) < 2:
        return False
    models, name = _models_at(config_class, parts[:-2]), str(parts[-2])
    fields = [model.model_fields[name] for model in models if name in model.model_fields]
    return any(_is_mapping(field.annotation) for field in fields)


def _is_mapping(annotation: Any) -> bool:
    return any(get_origin(member) is dict for member in _members(annotation))


def _models_below(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(_plain(annotation)) in {tuple, dict}:
        return [model for element in get_args(_plain(annotation)) for model in _models_in(element)]
    return _models_in(annotation)


def _explain(config_class: type[BaseModel], error: ValidationError) -> str:
    return "; ".join(_explain_one(config_class, detail) for detail in error.errors(include_url=False))


def _explain_one(config_class: type[BaseModel], detail: Any) -> str:
    place, siblings = detail["loc"], _models_at(config_class, detail["loc"][:-1])
    path = _dotted(config_class, place)
    match detail["type"]:
        case "extra_forbidden":
            names = {name: name for model in siblings for name in model.model_fields}
            return f"{path}: no such field; {_nearest(str(place[-1]), names)}"
        case "missing":
            fields = ".*" if _models_at(config_class, place) else ""
            return f"{path}: required; give it in the YAML file or as --{path}{fields}"
        case "union_tag_not_found":
            known = [str(_kind(model)) for model in _models_at(config_class, place)]
            return f"{path}.kind: required; one of {', '.join(known)}"
        case "union_tag_invalid":
            kinds = detail["ctx"]["expected_tags"].replace("'", "")
            return f"{path}.kind: {detail['ctx']['tag']!r} is not one of {kinds}"
        case "value_error":
            # Our own validators say what they found, or leave it out because it may be a secret.
            message = detail["msg"].removeprefix("Value error, ")
            return f"{path}: {message}" if path else str(message)
    found = "" if isinstance(detail["input"], dict) else f" (found {detail['input']!r:.80})"
    return f"{path}: {detail['msg']}{found}"


def _dotted(config_class: type[BaseModel], place: Sequence[str | int]) -> str:
    """`place` as a person writes it: without the kinds that pydantic puts in."""
    parts: list[str] = []
    for position, part in enumerate(place):
        models = _models_at(config_class, place[:position])
        kinds = {_kind(model) for model in models}
        last = position == len(place) - 1
        is_name = _is_key(config_class, place[: position + 1])
        if last or is_name or part not in kinds or any(part in model.model_fields for model in models):
            parts.append(str(part))
    return ".".join(parts)
