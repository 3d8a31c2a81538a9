"""Configuration documents: from files to settings."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from siderolink.client.config import models
from siderolink.client.config.files import read_up_to
from siderolink.client.config.settings import IngressRule, LogURL, MachineSettings, Setting
from siderolink.client.config.yaml_stream import MAX_BYTES, Location, Value, YamlDocument, read_documents, read_stream
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.text import one_line

MAX_FILES = 64
MAX_RULES = 4096
"""Ports and subnets of all firewall rules together."""
MAX_REPAIRS = 16
"""A document with more unusable keys than this is skipped as a whole."""
MAIN_KEYS = frozenset({"version", "machine", "cluster", "debug", "persist"})
"""A document without a kind that has one of these keys is a machine's main configuration."""
SUFFIXES = (".yaml", ".yml")
SERVER_SETTINGS = "serve.yaml"
"""In a directory, the settings of a server on the same host (`siderolink serve --config`); no documents."""

M = TypeVar("M", bound=models.Document)


@dataclass(frozen=True, slots=True)
class OtherDocument:
    """A document of a kind that is not SideroLink's. It is kept and has no effect here."""

    kind: str
    source: str
    value: Value = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Found:
    model: models.Document
    source: str


@dataclass(frozen=True, slots=True)
class Documents:
    """The settings from documents, and the documents of other programs."""

    settings: MachineSettings
    others: tuple[OtherDocument, ...] = ()


def load_documents(*paths: Path, read: Callable[[Path, int], bytes] = read_up_to) -> Documents:
    """Read files, and the ``.yaml`` and ``.yml`` files of directories in alphabetical order, without a server's ``serve.yaml``.

    An unusable part is skipped and reported as one line in ``settings.problems``: an optional key alone, any other together
    with its document. `read` reads a file up to a limit. Raises ConfigurationError for a path that cannot be read.
    """
    collected = _Collected()
    for path in paths:
        is_directory = path.is_dir()
        for file in list_files(path, collected.problems):
            try:
                data = read(file, MAX_BYTES + 1)
            except ConfigurationError as error:
                if not is_directory:
                    raise
                collected.problems.append(str(error))
                continue
            collected.add_stream(data, str(file))
    return collected.documents()


def salvage_documents(data: bytes, source: str) -> Documents:
    """Read one stream as `load_documents` reads a file."""
    collected = _Collected()
    collected.add_stream(data, source)
    return collected.documents()


def list_files(path: Path, problems: list[str]) -> list[Path]:
    """The files that `path` denotes. Adds to `problems` why a file of a directory is skipped.

    Raises ConfigurationError for a directory that cannot be read.
    """
    if not path.is_dir():
        return [path]
    try:
        files = (file for file in path.iterdir() if file.suffix in SUFFIXES and file.name != SERVER_SETTINGS)
        found = sorted(file for file in files if not file.name.startswith("."))
    except OSError as error:
        raise ConfigurationError(f"the directory {path} cannot be read: {error.strerror}") from None
    if len(found) > MAX_FILES:
        problems.append(f"{path}: more than {MAX_FILES} files; those after {found[MAX_FILES - 1].name} are ignored")
    usable = []
    for file in found[:MAX_FILES]:
        if file.is_file():
            usable.append(file)
        else:
            problems.append(f"{file} is not a regular file")
    return usable


def parse_documents(streams: Iterable[tuple[bytes, str]]) -> Documents:
    """Read streams of documents, each with a display name, and accept all of them or none.

    Raises ConfigurationError; its message names stream, line and key, the problem, and the allowed values.
    """
    collected = _Collected()
    for data, source in streams:
        for document in read_stream(data, source):
            collected.add(document)
    return collected.documents()


@dataclass(slots=True)
class _Collected:
    """Collects the documents of one or several files."""

    found: dict[tuple[str, str], _Found] = field(default_factory=dict)
    others: list[OtherDocument] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, document: YamlDocument) -> None:
        """Raises ConfigurationError unless everything in the document can be used."""
        where = f"{document.source}:{document.line}"
        value = document.value
        if not isinstance(value, dict):
            raise ConfigurationError(f"{where}: a document is a mapping with apiVersion and kind")
        kind = value.get("kind")
        if kind is None and _is_main_document(value):
            self.others.append(OtherDocument("machine configuration", where, value))
            return
        if not isinstance(kind, str):
            raise ConfigurationError(f"{where}: kind is missing or is not text; supported kinds are {', '.join(models.MODELS)}")
        model = models.MODELS.get(kind)
        if model is None:
            self.others.append(OtherDocument(one_line(kind, limit=100), where, value))
            return
        try:
            self._keep(_Found(model.model_validate(without_nulls(value)), where))
        except ValidationError as error:
            raise ConfigurationError(_explain_all(document, model, error)) from None

    def add_stream(self, data: bytes, source: str) -> None:
        """Add the usable parts of a stream of documents."""
        for document in read_documents(data, source):
            if isinstance(document, ConfigurationError):
                self.problems.append(str(document))
            else:
                self.add_what_can_be_used(document)

    def add_what_can_be_used(self, document: YamlDocument) -> None:
        """Like `add`, but skips unusable parts and reports them in `problems`."""
        value = document.value
        kind = value.get("kind") if isinstance(value, dict) else None
        model = models.MODELS.get(kind) if isinstance(kind, str) else None
        try:
            if model is None or not isinstance(value, dict):
                self.add(document)
            else:
                self._keep(_Found(self._repair(document, model, without_nulls(value)), f"{document.source}:{document.line}"))
        except ConfigurationError as error:
            self.problems.append(str(error))

    def _keep(self, read: _Found) -> None:
        name = getattr(read.model, "name", "")
        before = self.found.setdefault((read.model.KIND, name), read)
        if before is not read:
            called = f"a {read.model.KIND} named {one_line(name)!r}" if name else f"a {read.model.KIND}"
            raise ConfigurationError(f"{read.source}: {called} is already defined at {before.source}; only one is allowed")

    def _repair(self, document: YamlDocument, model: type[models.Document], value: dict[str, Any]) -> models.Document:
        """The document without its unusable keys. Raises ConfigurationError if it needs one of them."""
        fallbacks = {"apiVersion": "v1alpha1", "name": f"{document.source}:{document.line}"[-253:], **model.FALLBACKS}
        problems: list[str] = []
        while True:
            try:
                usable = model.model_validate(value)
            except ValidationError as error:
                details = _most_telling_first(error)
                location = details[0]["loc"]
                key = str(location[0]) if location else ""
                problem = explain(document, model, details[0])
                if key in model.ESSENTIAL or key == "kind" or len(problems) == MAX_REPAIRS:
                    raise ConfigurationError(problem + f"; the {model.KIND} is ignored") from None
                value = model.without(value, location)
                if key in fallbacks:
                    value[key] = fallbacks[key]
                instead = f"taken as {fallbacks[key]}" if key in model.FALLBACKS else "ignored"
                problems.append(f"{problem}; it is {instead}")
                continue
            self.problems.extend(problems)
            return usable

    def documents(self) -> Documents:
        """All documents. Raises ConfigurationError if there are too many firewall rules."""
        for other in self.others:
            close = get_close_matches(other.kind.lower(), [kind.lower() for kind in models.MODELS], 1, 0.8)
            if close:
                meant = next(kind for kind in models.MODELS if kind.lower() == close[0])
                self.problems.append(f"{other.source}: unknown kind {other.kind!r}; did you mean {meant}?")
        settings = _settings(list(self.found.values()), self.others)
        return Documents(replace(settings, problems=tuple(self.problems)), tuple(self.others))


def _is_main_document(value: dict[str, Any]) -> bool:
    return "apiVersion" not in value and not MAIN_KEYS.isdisjoint(value)


def without_nulls(value: Any) -> Any:
    """A key without a value counts as absent, as existing machines read it."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


# explaining problems


def _most_telling_first(error: ValidationError) -> list[ErrorDetails]:
    return sorted(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")


def _explain_all(document: YamlDocument, model: type[BaseModel], error: ValidationError) -> str:
    details = _most_telling_first(error)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return explain(document, model, details[0]) + more


_TYPES = {
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "model_attributes_type": "a mapping",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "path_type": "text",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("above", "gt"),
    "less_than": ("below", "lt"),
}
_FOUND = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}


def explain(document: YamlDocument, model: type[BaseModel], error: ErrorDetails) -> str:
    location: Location = tuple(error["loc"])
    line = document.line_of(location)
    key = one_line(_dotted(location), limit=120)
    return f"{document.source}:{line}: {key}: {describe_problem(model, location, error)}"


def describe_problem(model: type[BaseModel], location: Location, error: ErrorDetails) -> str:
    """Describes the problem at a location and the allowed values, without the location itself."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; allowed are {', '.join(_keys(model, location[:-1]))}"
    if kind == "missing":
        return f"is missing; needed are {', '.join(_keys(model, location[:-1], needed=True))}"
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected']}"
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"must be {words} {context[name]}"
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
    """The keys that are allowed, or required, at a location."""
    for part in location:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            if part in fields:  # else a key of a mapping of models, which is any
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
        notes=tuple(f"{other.source}: {other.kind} is not a document of SideroLink's and was skipped" for other in others),
    )


def _rule(model: models.NetworkRuleConfig) -> IngressRule:
    return IngressRule(
        name=model.name,
        protocol=model.port_selector.protocol,
        ports=tuple(model.port_selector.ports),
        subnets=tuple(rule.subnet for rule in model.ingress),
        exceptions=tuple(rule.except_ for rule in model.ingress if rule.except_ is not None),
    )
