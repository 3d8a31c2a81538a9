"""An exact copy of the existing machines' command-line client: its calls, its metadata, and its handling of answers.

Written from its public sources as facts (which method with which fields, which answer is an error), on grpcio and on Google's
protobuf with a schema of its own. Each command returns what it would print; `CommandError` is what it would end with.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import grpc
import yaml

from tests.support.machine_api import TIMEOUT, machine_client
from tests.support.wire_schema import messages

WIRE = messages(
    {
        "Empty": "",
        "Duration": "1:seconds:int64 2:nanos:int32",
        "Timestamp": "1:seconds:int64 2:nanos:int32",
        "Entry": "1:key:string 2:value:string",
        # machine.MachineService
        "CommonMetadata": "1:hostname:string 2:error:string",
        "VersionInfo": "1:tag:string 2:sha:string 3:built:string 4:go_version:string 5:os:string 6:arch:string",
        "PlatformInfo": "1:name:string 2:mode:string",
        "FeaturesInfo": "1:rbac:bool",
        "Version": "1:metadata:CommonMetadata 2:version:VersionInfo 3:platform:PlatformInfo 4:features:FeaturesInfo",
        "VersionResponse": "1:messages:*Version",
        "ApplyRequest": "1:data:bytes 4:mode:int32 5:dry_run:bool 6:try_mode_timeout:Duration",
        "Apply": "1:metadata:CommonMetadata 2:warnings:*string 3:mode:int32 4:mode_details:string",
        "ApplyResponse": "1:messages:*Apply",
        # cosi.resource.State
        "Metadata": "1:namespace:string 2:type:string 3:id:string 4:version:string 5:owner:string 6:phase:string "
        "7:created:Timestamp 8:updated:Timestamp 9:finalizers:*string 10:labels:*Entry 11:annotations:*Entry",
        "Spec": "1:proto_spec:bytes 2:yaml_spec:string",
        "Resource": "1:metadata:Metadata 2:spec:Spec",
        "LabelTerm": "1:key:string 2:op:int32 3:value:*string 4:invert:bool",
        "LabelQuery": "1:terms:*LabelTerm",
        "IDQuery": "1:regexp:string",
        "ListOptions": "1:label_query:*LabelQuery 2:id_query:IDQuery",
        "ListRequest": "1:namespace:string 2:type:string 3:options:ListOptions",
        "ListResponse": "1:resource:Resource",
        "GetRequest": "1:namespace:string 2:type:string 3:id:string 4:options:Empty",
        "GetResponse": "1:resource:Resource",
        "WatchOptions": "1:bootstrap_contents:bool 2:tail_events:int32 3:label_query:*LabelQuery 4:id_query:IDQuery "
        "5:aggregated:bool 6:start_from_bookmark:bytes 7:bootstrap_bookmark:bool",
        "WatchRequest": "1:namespace:string 2:type:string 3:id:string 4:options:WatchOptions 5:api_version:int32",
        "Event": "1:resource:Resource 2:event_type:int32 3:old:Resource 4:error:string 5:bookmark:bytes",
        "WatchResponse": "1:event:*Event",
        # the spec of a ResourceDefinition
        "PrintColumn": "1:name:string 2:json_path:string",
        "Definition": "1:resource_type:string 2:display_type:string 3:default_namespace:string 4:aliases:*string "
        "5:all_aliases:*string 6:print_columns:*PrintColumn 7:sensitivity:int32",
    }
)
_SEMVER = re.compile(r"v?(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
_MODES = ("reboot", "auto", "no-reboot", "staged", "try")
_CLIENT = (1, 14, 0)
"""The client's version; the client warns if the machine's is older."""
_CREATED, _UPDATED, _DESTROYED, _BOOTSTRAPPED = range(4)


class CommandError(Exception):
    """Raised where the command would end with an error."""


@dataclass
class Talosctl:
    """``talosctl --nodes NODE … --insecure``; every method is one command, with a connection of its own."""

    node: str
    port: int = 50000

    def version_soon(self) -> str:
        """Retries `version` until the machine listens, which may be a moment after its link is up."""
        for _ in range(100):
            try:
                return self.version()
            except OSError:
                time.sleep(0.1)
        return self.version()

    def version(self) -> str:
        """``version --insecure``."""
        with self._session() as session:
            answer = session.version()
        lines = []
        for message in answer.messages:
            if not message.HasField("version"):
                raise CommandError("a nil version")
            found = message.version
            lines += [
                f"\tNODE:        {message.metadata.hostname or self.node}",
                f"\tTag:         {found.tag}",
                f"\tSHA:         {found.sha}",
                f"\tBuilt:       {found.built}",
                f"\tGo version:  {found.go_version}",
                f"\tOS/Arch:     {found.os}/{found.arch}",
                f"\tEnabled:     {'RBAC' if message.features.rbac else ''}",
            ]
        return "Server:\n" + "\n".join(lines) + "\n"

    def get(self, alias: str, resource_id: str = "", *, output: str = "table") -> str:
        """``get ALIAS [ID] --insecure [-o yaml]``."""
        with self._session() as session:
            session.check_version()
            definition = session.resolve(alias)
            if resource_id:
                found = [session.get(definition, resource_id)]
            else:
                found = session.list(definition.resource_type, definition.default_namespace)
        if output == "yaml":
            return "---\n".join(f"node: {self.node}\n{_yaml(resource)}" for resource in found)
        return _table(self.node, definition, found)

    def watch(self, alias: str, count: int) -> list[str]:
        """``get -w ALIAS --insecure``, up to so many lines."""
        with self._session() as session:
            session.check_version()
            definition = session.resolve(alias)
            events = session.watch(definition.resource_type, definition.default_namespace)
            return [f"{mark} {resource.metadata.id}" for mark, resource in islice(events, count)]

    def apply_config(self, data: bytes, *, mode: str = "auto", timeout: int = 60, dry_run: bool = False) -> str:
        """``apply-config --insecure -f FILE [--mode MODE] [--timeout SECONDS] [--dry-run]``."""
        seconds = WIRE["Duration"](seconds=timeout)
        request = WIRE["ApplyRequest"](data=data, mode=_MODES.index(mode), dry_run=dry_run, try_mode_timeout=seconds)
        with self._session() as session:
            answer = session.call("/machine.MachineService/ApplyConfiguration", request, "ApplyResponse")
        lines = []
        for message in answer.messages:
            lines += [f"WARNING: {warning}" for warning in message.warnings]
            lines += [message.mode_details] if message.mode_details else []
        return "".join(f"{line}\n" for line in lines)

    def _session(self) -> "_Session":
        return _Session(self.node, self.port)


class _Session:
    """One connection."""

    def __init__(self, node: str, port: int) -> None:
        self._node = node
        # the client checks no certificate; grpcio always does, and gets the one that the server presents
        self._client = machine_client(node, port)

    def __enter__(self) -> "_Session":
        self._channel = self._client.__enter__().channel
        return self

    def __exit__(self, *error: Any) -> None:
        self._client.__exit__(*error)

    def call(self, path: str, request: Any, answer: str, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
        try:
            data = self._channel.unary_unary(path)(request.SerializeToString(), timeout=TIMEOUT, metadata=metadata)
        except grpc.RpcError as error:
            raise CommandError(f"rpc error: code = {error.code().name} desc = {error.details()}") from error
        return WIRE[answer].FromString(data)

    def version(self) -> Any:
        return self.call("/machine.MachineService/Version", WIRE["Empty"](), "VersionResponse")

    def check_version(self) -> None:
        """The first call of ``get``; a tag that is not a semantic version ends it, and an older one causes a warning."""
        for message in self.version().messages:
            found = _SEMVER.fullmatch(message.version.tag)
            if found is None:
                raise CommandError(f"error parsing server version: {message.version.tag!r}")
            if tuple(map(int, found.groups()[:3])) < _CLIENT:
                raise CommandError(f"WARNING: server version {message.version.tag} is older than the client's")

    def resolve(self, alias: str) -> Any:
        """The definition that has this alias; more than one, or none, is an error."""
        matched = []
        for resource in self.list("ResourceDefinitions.meta.cosi.dev", "meta"):
            definition = WIRE["Definition"].FromString(resource.spec.proto_spec)
            names = [resource.metadata.id, *definition.all_aliases]
            if alias.lower() in [name.lower() for name in names]:
                matched.append(definition)
        if len(matched) != 1:
            raise CommandError(f"resource {alias!r} is {'ambiguous' if matched else 'not registered'}")
        return matched[0]

    def list(self, type_name: str, namespace: str) -> list[Any]:
        options = WIRE["ListOptions"](id_query=WIRE["IDQuery"]())
        request = WIRE["ListRequest"](namespace=namespace, type=type_name, options=options)
        return [_checked(answer.resource) for answer in self._stream("List", request, "ListResponse")]

    def get(self, definition: Any, resource_id: str) -> Any:
        request = WIRE["GetRequest"](
            namespace=definition.default_namespace, type=definition.resource_type, id=resource_id, options=WIRE["Empty"]()
        )
        answer = self.call("/cosi.resource.State/Get", request, "GetResponse", (("node", self._node),))
        return _checked(answer.resource)

    def watch(self, type_name: str, namespace: str) -> Iterator[tuple[str, Any]]:
        """Marks and resources. The first answer is empty and confirms the watch."""
        options = WIRE["WatchOptions"](bootstrap_contents=True, id_query=WIRE["IDQuery"]())
        request = WIRE["WatchRequest"](namespace=namespace, type=type_name, options=options, api_version=1)
        answers = self._stream("Watch", request, "WatchResponse")
        if next(answers).event:
            raise CommandError("the first answer is not empty")
        marks = {_CREATED: "+", _UPDATED: " ", _DESTROYED: "-"}
        for answer in answers:
            for event in answer.event:
                if event.HasField("resource"):
                    _checked(event.resource)
                if event.event_type != _BOOTSTRAPPED:
                    yield marks[event.event_type], event.resource

    def _stream(self, method: str, request: Any, answer: str) -> Iterator[Any]:
        call = self._channel.unary_stream(f"/cosi.resource.State/{method}")(
            request.SerializeToString(), timeout=TIMEOUT, metadata=(("node", self._node),)
        )
        try:
            for data in call:
                yield WIRE[answer].FromString(data)
        except grpc.RpcError as error:
            raise CommandError(f"rpc error: code = {error.code().name} desc = {error.details()}") from error
        finally:
            call.cancel()


def _checked(resource: Any) -> Any:
    """What the client's library refuses."""
    for part in ("metadata", "spec"):
        if not resource.HasField(part):
            raise CommandError(f"{part} is missing")
    version, phase = resource.metadata.version, resource.metadata.phase
    if version != "undefined" and not version.isdigit():
        raise CommandError(f"not a version: {version!r}")
    if phase not in ("running", "tearingDown"):
        raise CommandError(f"not a phase: {phase!r}")
    return resource


def _spec(resource: Any) -> Any:
    if not resource.spec.yaml_spec:
        raise CommandError("YAML spec is not specified")
    return yaml.safe_load(resource.spec.yaml_spec)


def _yaml(resource: Any) -> str:
    found = resource.metadata
    metadata = {
        "namespace": found.namespace,
        "type": found.type,
        "id": found.id,
        "version": found.version,
        "owner": found.owner,
        "phase": found.phase,
        "created": found.created.seconds,
        "updated": found.updated.seconds,
    }
    return yaml.safe_dump({"metadata": metadata, "spec": _spec(resource)}, sort_keys=False)


def _table(node: str, definition: Any, resources: list[Any]) -> str:
    heads = ["NODE", "NAMESPACE", "TYPE", "ID", "VERSION", *(column.name.upper() for column in definition.print_columns)]
    rows = [heads]
    for resource in resources:
        found, spec = resource.metadata, _spec(resource)
        cells = [_cell(column.json_path, spec) for column in definition.print_columns]
        rows.append([node, found.namespace, definition.display_type, found.id, found.version, *cells])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "".join("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + "\n" for row in rows)


def _cell(path: str, spec: Any) -> str:
    """A column's JSON path: a field, or all members of one."""
    match = re.fullmatch(r"\{\.([A-Za-z_.]+)(\[:\])?\}", path)
    if match is None:
        raise CommandError(f"error parsing column jsonpath {path!r}")
    value = spec
    for key in match[1].split("."):
        value = value.get(key, "")
    if match[2] or isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
