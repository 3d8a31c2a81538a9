"""Configuration documents: from files to settings."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from siderolink.client.config import models
from siderolink.client.config.files import read_up_to
from siderolink.client.config.log_url import LogURL
from siderolink.client.config.settings import IngressRule, MachineSettings, Setting
from siderolink.client.config.yaml_stream import MAX_BYTES, Location, Value, YamlDocument, read_stream
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.text import one_line

MAX_FILES = 64
MAX_RULES = 4096
"""Ports and subnets of all firewall rules together."""
SUFFIXES = (".yaml", ".yml")

M = TypeVar("M", bound=models.Document)


@dataclass(frozen=True, slots=True)
class OtherDocument:
    """A document of a kind that is not SideroLink's: read, and kept apart."""

    kind: str
    source: str
    value: Value = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Found:
    model: models.Document
    source: str


@dataclass(frozen=True, slots=True)
class Documents:
    """What documents say, and those that are not ours."""

    settings: MachineSettings
    others: tuple[OtherDocument, ...] = ()


def load_documents(*paths: Path, read: Callable[[Path, int], bytes] = read_up_to) -> Documents:
    """Read files, and of directories the ``.yaml`` and ``.yml`` files in the order of their names.

    `read` reads a file up to so many bytes. Raises ConfigurationError; its message names file, line and key, what is wrong, and
    what is allowed.
    """
    return parse_documents((read(file, MAX_BYTES + 1), str(file)) for path in paths for file in list_files(path))


def list_files(path: Path) -> list[Path]:
    """The files that `path` stands for. Raises ConfigurationError."""
    if not path.is_dir():
        return [path]
    try:
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith("."))
    except OSError as error:
        raise ConfigurationError(f"the directory {path} cannot be read: {error.strerror}") from None
    if len(found) > MAX_FILES:
        raise ConfigurationError(f"{path}: more than {MAX_FILES} files")
    for file in found:
        if not file.is_file():
            raise ConfigurationError(f"{file} is no regular file")
    return found


def parse_documents(streams: Iterable[tuple[bytes, str]]) -> Documents:
    """Read streams of documents, each with its name for people. Raises ConfigurationError as `load_documents` does."""
    found: dict[tuple[str, str], _Found] = {}
    others: list[OtherDocument] = []
    for data, source in streams:
        for document in read_stream(data, source):
            read = _read(document)
            if isinstance(read, OtherDocument):
                others.append(read)
                continue
            name = getattr(read.model, "name", "")
            before = found.setdefault((read.model.KIND, name), read)
            if before is not read:
                called = f"a {read.model.KIND} named {one_line(name)!r}" if name else f"a {read.model.KIND}"
                raise ConfigurationError(f"{read.source}: there is {called} already, at {before.source}; one is allowed")
    return Documents(_settings(list(found.values()), others), tuple(others))


def _read(document: YamlDocument) -> _Found | OtherDocument:
    where = f"{document.source}:{document.line}"
    value = document.value
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where}: a document is a mapping with apiVersion and kind")
    kind = value.get("kind")
    if kind is None and "version" in value and "apiVersion" not in value:
        return OtherDocument("machine configuration", where, value)
    if not isinstance(kind, str):
        allowed = ", ".join(models.MODELS)
        raise ConfigurationError(f"{where}: kind is missing or no text; SideroLink knows {allowed}")
    model = models.MODELS.get(kind)
    if model is None:
        return OtherDocument(one_line(kind, limit=100), where, value)
    try:
        return _Found(model.model_validate(value), where)
    except ValidationError as error:
        details = sorted(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise ConfigurationError(_explain(document, model, details[0]) + more) from None


# explaining what is wrong

_TYPES = {
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_FOUND = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}


def _explain(document: YamlDocument, model: type[BaseModel], error: ErrorDetails) -> str:
    location: Location = tuple(error["loc"])
    line = document.line_of(location)
    key = one_line(_dotted(location), limit=120)
    return f"{document.source}:{line}: {key}: {_problem(model, location, error)}"


def _problem(model: type[BaseModel], location: Location, error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; allowed are {', '.join(_keys(model, location[:-1]))}"
    if kind == "missing":
        return f"is missing; needed are {', '.join(_keys(model, location[:-1], needed=True))}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "value_error":
        return str(context["error"])
    if kind in _TYPES:
        found = error["input"]
        quotes = ", so put it in quotes" if kind == "string_type" and isinstance(found, int | float) else ""
        return f"must be {_TYPES[kind]}, not {_FOUND.get(type(found), 'nothing')}{quotes}"
    if kind.endswith("too_long"):
        return f"is too long; at most {context.get('max_length')} are allowed"
    if kind.endswith("too_short"):
        return "must not be empty"
    return one_line(error["msg"])


def _dotted(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _keys(model: type[BaseModel], location: Location, *, needed: bool = False) -> list[str]:
    """The keys that may, or must, stand at a location."""
    for part in location:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            model = _model_in(fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items() if field.is_required() or not needed]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


# from models to settings


def _settings(found: list[_Found], others: list[OtherDocument]) -> MachineSettings:
    def of(kind: type[M]) -> Iterator[tuple[M, str]]:
        for item in found:
            if isinstance(item.model, kind):
                yield item.model, f"{item.source} {kind.KIND}"

    def one(kind: type[M]) -> tuple[M, str] | None:
        return next(of(kind), None)

    join, sink, action = one(models.SideroLinkConfig), one(models.EventSinkConfig), one(models.NetworkDefaultActionConfig)
    rules = tuple(Setting(_rule(model), source) for model, source in of(models.NetworkRuleConfig))
    size = sum(len(rule.value.ports) + len(rule.value.subnets) + len(rule.value.exceptions) for rule in rules)
    if size > MAX_RULES:
        raise ConfigurationError(f"the firewall rules name more than {MAX_RULES} ports and subnets")
    return MachineSettings(
        url=Setting(JoinURL.parse(join[0].api_url), join[1]) if join else None,
        unique_token=Setting(join[0].unique_token, join[1]) if join and join[0].unique_token else None,
        event_sink=Setting(HostPort.parse(sink[0].endpoint), sink[1]) if sink else None,
        kernel_logs=tuple(Setting(LogURL.parse(model.url), source) for model, source in of(models.KmsgLogConfig)),
        trusted_roots=tuple(Setting(model.certificates, source) for model, source in of(models.TrustedRootsConfig)),
        default_action=Setting(action[0].ingress, action[1]) if action else None,
        ingress_rules=rules,
        notes=tuple(f"{other.source}: {other.kind} is none of SideroLink's and was passed over" for other in others),
    )


def _rule(model: models.NetworkRuleConfig) -> IngressRule:
    return IngressRule(
        name=model.name,
        protocol=model.port_selector.protocol,
        ports=tuple(model.port_selector.ports),
        subnets=tuple(rule.subnet for rule in model.ingress),
        exceptions=tuple(rule.except_ for rule in model.ingress if rule.except_ is not None),
    )
