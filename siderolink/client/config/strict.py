"""Strict decoding of a configuration, all or nothing, with the error texts that clients know.

Files on the machine are read leniently (`documents`), because a typo must not keep a machine from joining. The sender of a
configuration, in contrast, can read the error.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from siderolink.client.config import models
from siderolink.client.config.documents import explain, parse_documents, without_nulls
from siderolink.client.config.settings import MachineSettings
from siderolink.client.config.yaml_stream import YamlDocument, read_stream
from siderolink.common.errors import ConfigurationError
from siderolink.common.text import one_line

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SOURCE = "the configuration"
VERSION = "v1alpha1"
_MAIN_KEYS = frozenset({"machine", "cluster", "debug", "persist"})
_LONGEST_TEXT = 4096
"""Maximum characters of a list of unknown keys."""
_JOIN = models.SideroLinkConfig.KIND
OTHER_KINDS = frozenset(
    (
        # block devices
        *(
            "DiskHealthMonitoringConfig",
            "DiskSmartConfig",
            "ExistingVolumeConfig",
            "ExternalVolumeConfig",
            "FilesystemScrubConfig",
        ),
        *(
            "FilesystemScrubConfig",
            "FilesystemTrimConfig",
            "LVMConfig",
            "LVMLogicalVolumeConfig",
            "LVMPhysicalVolumeConfig",
            "LVMVolumeGroupConfig",
        ),
        *("RAIDConfig", "RawVolumeConfig", "SwapVolumeConfig", "UserVolumeConfig", "VolumeConfig", "ZswapConfig"),
        # cluster and containers
        *(
            "BaseRuntimeSpecConfig",
            "ContainerConfig",
            "ContentLibraryConfig",
            "CRICustomizationConfig",
            "DiscoveryIdentityConfig",
        ),
        *(
            "DiscoveryIdentityConfig",
            "DiscoveryServiceConfig",
            "ImageCacheConfig",
            "RegistryAuthConfig",
            "RegistryMirrorConfig",
            "RegistryTLSConfig",
        ),
        "VirtualMachineConfig",
        # Kubernetes
        *("KubeAPIServerCAConfig", "KubeAPIServerConfig", "KubeAdmissionControlConfig", "KubeAggregatorCAConfig"),
        *("KubeAuditPolicyConfig", "KubeAuthenticationConfig", "KubeAuthorizerConfig", "KubeClusterConfig"),
        *("KubeControllerManagerConfig", "KubeCoreDNSConfig", "KubeCredentialProviderConfig", "KubeEtcdEncryptionConfig"),
        *("KubeExternalManifestConfig", "KubeFlannelConfig", "KubeInlineManifestConfig", "KubeletConfig", "KubeNetworkConfig"),
        *("KubeNodeConfig", "KubePrismConfig", "KubeProxyConfig", "KubeSchedulerConfig", "KubeServiceAccountConfig"),
        *("KubeStaticPodConfig", "KubeTalosAPIAccessConfig"),
        # network
        *("BGPConfig", "BGPInstanceConfig", "BGPPeerConfig", "BlackholeRouteConfig", "BondConfig", "BridgeConfig"),
        *("DHCPv4Config", "DHCPv6Config", "DummyLinkConfig", "EthernetConfig", "HCloudVIPConfig", "HTTPProbeConfig"),
        *("HostnameConfig", "KubeSpanConfig", "KubeSpanEndpointsConfig", "KubespanEndpointsConfig", "Layer2VIPConfig"),
        *("LinkAliasConfig", "LinkConfig", "MacVLANConfig", "NATRuleConfig", "NetworkLinkIngressConfig", "NetworkWiFiConfig"),
        *("ProbeConfig", "ResolverConfig", "RoutingRuleConfig", "StaticHostConfig", "TCPProbeConfig", "TimeSyncConfig"),
        *("VETHConfig", "VLANConfig", "VRFConfig", "VXLANConfig", "WireguardConfig"),
        # the operating system
        *("CPUPartitionConfig", "CPUScalingConfig", "EnvironmentConfig", "EtcFileConfig", "ExtensionServiceConfig"),
        *("ImageVerificationConfig", "KernelModuleConfig", "OOMConfig", "PCIDriverRebindConfig", "SecurityProfileConfig"),
        *("SysctlConfig", "SysfsConfig", "UdevRulesConfig", "UnattendedInstallConfig", "WatchdogTimerConfig"),
        "WorkloadResourceConfig",
    )
)
"""Kinds that existing machines know. They are accepted and kept, and have no effect here."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration that was accepted."""

    data: bytes = field(repr=False)
    """The documents, unchanged."""
    settings: MachineSettings
    warnings: tuple[str, ...] = ()

    @property
    def has_join(self) -> bool:
        """Whether it contains a join URL."""
        return self.settings.url is not None

    def with_join_of(self, other: "Configuration") -> "Configuration":
        """This configuration and the other's SideroLinkConfig."""
        assert other.settings.url is not None
        fields = {"apiVersion": VERSION, "kind": _JOIN, "apiUrl": other.settings.url.value.encode()}
        if other.settings.unique_token is not None:
            fields["uniqueToken"] = other.settings.unique_token.value
        lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
        text = self.data.rstrip() + b"\n---\n" + "\n".join(lines).encode() + b"\n"
        return Configuration(text, decode(text).settings, self.warnings)


def decode(data: bytes) -> Configuration:
    """Decode a configuration. Raises ConfigurationError for anything that existing machines refuse, with their text, and for a
    main document."""
    found: dict[tuple[str, str, str], YamlDocument] = {}
    for document in read_stream(data, SOURCE):
        name = _name_of(document)
        if name in found:
            raise ConfigurationError(f"duplicate document {'/'.join(name)} is not allowed (line {document.line})")
        found[name] = document
        _check_document(document, name)
    if not found:
        raise ConfigurationError("config not found")
    settings = parse_documents([(data, SOURCE)]).settings
    others = [kind for _, kind, _ in found if kind not in models.MODELS]
    warnings = tuple(f"{kind} is kept and has no effect on this machine" for kind in dict.fromkeys(others))
    return Configuration(data, settings, warnings)


def _name_of(document: YamlDocument) -> tuple[str, str, str]:
    """The identity of a document: version, kind and name."""
    value = document.value
    if not isinstance(value, dict):
        raise ConfigurationError(f"expected a YAML document at line {document.line}")

    def text(key: str) -> str:
        found = value.get(key)
        return one_line(found, limit=253) if isinstance(found, str) else ""

    return text("apiVersion"), text("kind") or VERSION, text("name")


def _check_document(document: YamlDocument, name: tuple[str, str, str]) -> None:
    value = document.value
    assert isinstance(value, dict)
    version, kind = name[0], value.get("kind") or ""
    if not _MAIN_KEYS.isdisjoint(value) or (version == VERSION and not kind):
        raise ConfigurationError(
            f"line {document.line}: a main configuration (machine, cluster) is not for this machine: it joins its server and "
            f"runs no cluster; send documents with a kind alone, such as {', '.join(models.MODELS)}"
        )
    problem = None
    if not kind:
        problem = "missing kind"
    elif not version:
        problem = "missing apiVersion"
    elif version != VERSION or (name[1] not in models.MODELS and name[1] not in OTHER_KINDS):
        problem = f'"{name[1]}" "{version}": not registered'
    if problem is not None:
        raise ConfigurationError(f"error decoding document {'/'.join(name)} (line {document.line}): {problem}")
    model = models.MODELS.get(name[1])
    if model is not None:
        unknown = [tuple(found["loc"]) for found in _errors(model, value) if found["type"] == "extra_forbidden"]
        if unknown:
            raise ConfigurationError(f"unknown keys found during decoding:\n{_bounded(_yaml(_picked(value, unknown)))}")
        found = _errors(model, without_nulls(value))
        if found:
            raise ConfigurationError("\n".join(explain(document, model, one) for one in found))


def _errors(model: type[models.Document], value: object) -> "list[ErrorDetails]":
    try:
        model.model_validate(value)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _picked(value: Any, places: list[tuple[int | str, ...]]) -> Any:
    """The parts of a value at these locations, nested in their containers."""
    if () in places:
        return value
    inner: dict[int | str, list[tuple[int | str, ...]]] = {}
    for place in places:
        inner.setdefault(place[0], []).append(place[1:])
    found = {key: _picked(value[key], rest) for key, rest in sorted(inner.items(), key=lambda item: str(item[0]))}
    return list(found.values()) if isinstance(value, list) else found


def _yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Lines of YAML, indented as by existing machines."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if isinstance(inner, dict | list) and inner:
                yield f"{indent}{_scalar(key)}:"
                yield from _yaml(inner, indent + "    ")
            else:
                yield f"{indent}{_scalar(key)}: {_scalar(inner)}"
    elif isinstance(value, list) and value:
        for inner in value:
            mark = "- "
            for line in _yaml(inner):
                yield f"{indent}{mark}{line}"
                mark = "  "
    else:
        yield indent + _scalar(value)


def _bounded(lines: Iterator[str]) -> str:
    """The lines as one text, cut off where it is too long: aliases can make it very much longer than the configuration."""
    text = ""
    for line in lines:
        text += f"{line}\n"
        if len(text) > _LONGEST_TEXT:
            return text[:_LONGEST_TEXT] + "…\n"
    return text


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        value = value[:_LONGEST_TEXT]
    text = str(yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True))
    return text.removesuffix("...\n").strip()
