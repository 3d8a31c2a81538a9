"""The settings of `serve` from three places: a file, overridden by the environment, overridden by arguments."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from siderolink.cli.serve_config import ALTERNATIVES, ServeConfig, extra_of
from siderolink.cli.serve_values import kebab
from siderolink.client.config.documents import describe_problem, explain, without_nulls
from siderolink.client.config.yaml_stream import MAX_BYTES, YamlDocument, read_stream
from siderolink.common.errors import ConfigurationError
from siderolink.common.text import one_line

ENVIRONMENT_PREFIX = "SIDEROLINK_"
_LIMIT = re.compile(r"([a-z][a-z0-9-]*)=([0-9]{1,15}(?:\.[0-9]{1,9})?)\Z")
LIMIT_FIELDS = ("limit", "api_limit", "report_limit")
_MASK = "…"


def variable(name: str) -> str:
    """The environment variable of a field."""
    return ENVIRONMENT_PREFIX + name.upper()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Settings from one place, by field name."""

    values: dict[str, Any]
    document: YamlDocument | None = None
    """The file; None for a layer of options."""
    is_environment: bool = False

    def explain(self, error: ErrorDetails) -> str:
        """One line with the place of the problem and its description."""
        if self.document is not None:
            return explain(self.document, ServeConfig, error)
        key, *inner = error["loc"]
        within = "".join(f"{part}: " for part in inner if isinstance(part, str))
        return f"{within}{describe_problem(ServeConfig, tuple(error['loc']), error)} ({self.name_of(str(key))})"

    def place(self, name: str) -> str:
        """The place of a setting."""
        if self.document is not None:
            return f"{self.document.source}:{self.document.line_of((kebab(name),))}"
        return self.name_of(kebab(name))

    def name_of(self, key: str) -> str:
        """The name by which the value was given: an option, a variable or a key."""
        return variable(key.replace("-", "_")) if self.is_environment else f"--{key}"


def read_serve_config(
    file: Path | None, environment: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[ServeConfig, tuple[Layer, ...]]:
    """The settings and their layers. Raises ConfigurationError with one line per problem."""
    layers = (
        *(() if file is None else (_read_file(file),)),
        Layer(values=_with_limits(environment, is_environment=True), is_environment=True),
        Layer(values=_with_limits(arguments, is_environment=False)),
    )
    merged: dict[str, Any] = {}
    origins: dict[str, Layer] = {}
    for layer in layers:
        for group in ALTERNATIVES:
            if any(name in layer.values for name in group):
                for name in group:
                    merged.pop(kebab(name), None)
        for name, value in layer.values.items():
            key = kebab(name)
            is_part = name in LIMIT_FIELDS and isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merged[key] | value if is_part else value
            origins[key] = layer
    try:
        return ServeConfig.model_validate(merged), layers
    except ValidationError as error:
        raise ConfigurationError("\n".join(dict.fromkeys(_problems(error, origins)))) from None


def describe_settings(settings: ServeConfig, layers: tuple[Layer, ...]) -> Iterator[str]:
    """One line for each setting that differs from its default: the value, or a mask for a secret, and its source."""
    for name in ServeConfig.model_fields:
        places = [layer.place(name) for layer in layers if name in layer.values]
        value = getattr(settings, name)
        if places and value not in (None, []):
            shown = _MASK if extra_of(name).get("secret") else one_line(_shown(value))
            yield f"{kebab(name)}: {shown}  ({one_line(places[-1])})"


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        return ", ".join(f"{key}={number}" for key, number in value.model_dump(exclude_none=True, by_alias=True).items())
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, list) else str(value)


def _problems(error: ValidationError, origins: Mapping[str, Layer]) -> Iterator[str]:
    for details in error.errors(include_url=False):
        layer = origins.get(str(details["loc"][0])) if details["loc"] else None
        yield describe_problem(ServeConfig, (), details) if layer is None else layer.explain(details)


def _read_file(file: Path) -> Layer:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration {file}: {error.strerror} (--config)") from None
    documents = list(read_stream(data, str(file)))
    if len(documents) > 1:
        raise ConfigurationError(f"{file}:{documents[1].line}: a second document; one is expected")
    if not documents:
        return Layer(values={})
    (document,) = documents
    value = without_nulls(document.value)
    if not isinstance(value, dict):
        raise ConfigurationError(f"{file}:{document.line}: must be a mapping of settings, such as api-listen: '[::]:8090'")
    for key in value:
        if key != kebab(key) or key != key.lower():
            wanted = kebab(re.sub(r"(?<=[a-z])(?=[A-Z])", "-", key)).lower()
            hint = f"; write {wanted}" if wanted.replace("-", "_") in ServeConfig.model_fields else ""
            raise ConfigurationError(f"{file}:{document.line_of((key,))}: {one_line(key, limit=60)}: unknown key{hint}")
    return Layer(values={key.replace("-", "_"): inner for key, inner in value.items()}, document=document)


def _with_limits(given: Mapping[str, Any], *, is_environment: bool) -> dict[str, Any]:
    """The given values, with those like ``max-machines=1000`` as a mapping."""
    found = {name: value for name, value in given.items() if value is not None and value != []}
    for name in LIMIT_FIELDS:
        if name in found:
            place = variable(name) if is_environment else f"--{kebab(name)}"
            found[name] = dict(_read_limit(text, place) for text in found[name])
    return found


def _read_limit(text: str, place: str) -> tuple[str, int | float]:
    match = _LIMIT.match(text)
    if match is None:
        raise ConfigurationError(f"{one_line(text, limit=60)!r} is not NAME=NUMBER, such as max-machines=1000 ({place})")
    return match[1], float(match[2]) if "." in match[2] else int(match[2])
