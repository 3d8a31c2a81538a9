"""The types of resources that a machine offers, as clients know them: full name, aliases, columns, and who may read them."""

from dataclasses import dataclass

from siderolink.client.maintenance.resources.spec import ResourceSpec
from siderolink.common.pb.cosi.resource.meta import (
    NamespaceSpec,
    ResourceDefinitionSpec,
    ResourceDefinitionSpecPrintColumn,
    ResourceDefinitionSpecSensitivity,
)

META = "meta"
"""The namespace of what describes resources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceType:
    """One type."""

    name: str
    """The full name: a plural in CamelCase, a dot and a domain."""
    singular: str
    """What one is called, for people."""
    namespace: str
    """Where clients look when they are told no namespace."""
    aliases: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    """Titles and JSON paths of a table's columns."""
    is_sensitive: bool = False
    """Whether only an admin may read it."""

    @property
    def id(self) -> str:
        """The id of its definition."""
        return self.name.lower()

    @property
    def short_names(self) -> tuple[str, ...]:
        """Its aliases, the singular, and the capitals of its name, as clients expect to find them."""
        plural = self.name.partition(".")[0]
        capitals = "".join(letter for letter in plural if letter.isupper()).lower()
        names = [*self.aliases, self.singular.lower()]
        if len(capitals) > 1:
            names.append(capitals)
            if not capitals.endswith("s"):
                names.append(f"{capitals}s")
        return tuple(names)

    @property
    def all_names(self) -> tuple[str, ...]:
        """All by which it may be called but its full name."""
        plural, *domain = self.name.lower().split(".")
        partial = (".".join((plural, *domain[:count])) for count in range(len(domain)))
        return (*partial, *self.short_names)

    def definition(self) -> ResourceSpec:
        """What clients ask for first."""
        sensitivity = ResourceDefinitionSpecSensitivity
        spec = ResourceDefinitionSpec(
            resource_type=self.name,
            display_type=self.singular,
            default_namespace=self.namespace,
            aliases=list(self.short_names),
            all_aliases=list(self.all_names),
            print_columns=[ResourceDefinitionSpecPrintColumn(name=name, json_path=path) for name, path in self.columns],
            sensitivity=sensitivity.SENSITIVE if self.is_sensitive else sensitivity.NON_SENSITIVE,
        )
        fields: dict[str, object] = {
            "type": self.name,
            "displayType": self.singular,
            "defaultNamespace": self.namespace,
            "aliases": list(self.short_names),
            "allAliases": list(self.all_names),
            "printColumns": [{"name": name, "jsonPath": path} for name, path in self.columns],
        }
        if self.is_sensitive:
            fields["sensitivity"] = "sensitive"
        return ResourceSpec(bytes(spec), fields)


def namespace_spec(description: str) -> ResourceSpec:
    return ResourceSpec(bytes(NamespaceSpec(description=description)), {"description": description})


RESOURCE_DEFINITION = ResourceType(
    name="ResourceDefinitions.meta.cosi.dev",
    singular="ResourceDefinition",
    namespace=META,
    aliases=("api-resources",),
    columns=(("Aliases", "{.aliases[:]}"),),
)
NAMESPACE = ResourceType(name="Namespaces.meta.cosi.dev", singular="Namespace", namespace=META, aliases=("ns",))
LINK_STATUS = ResourceType(
    name="LinkStatuses.net.talos.dev",
    singular="LinkStatus",
    namespace="network",
    aliases=("link", "links"),
    columns=(
        ("Alias", "{.alias}"),
        ("Type", "{.type}"),
        ("Kind", "{.kind}"),
        ("Hw Addr", "{.hardwareAddr}"),
        ("Oper State", "{.operationalState}"),
        ("Link State", "{.linkState}"),
    ),
)
ADDRESS_STATUS = ResourceType(
    name="AddressStatuses.net.talos.dev",
    singular="AddressStatus",
    namespace="network",
    aliases=("address", "addresses"),
    columns=(("Address", "{.address}"), ("Link", "{.linkName}")),
)
HOSTNAME_STATUS = ResourceType(
    name="HostnameStatuses.net.talos.dev",
    singular="HostnameStatus",
    namespace="network",
    aliases=("hostname",),
    columns=(("Hostname", "{.hostname}"), ("Domainname", "{.domainname}")),
)
SYSTEM_INFORMATION = ResourceType(
    name="SystemInformations.hardware.talos.dev",
    singular="SystemInformation",
    namespace="hardware",
    columns=(
        ("Manufacturer", "{.manufacturer}"),
        ("ProductName", "{.productName}"),
        ("Version", "{.version}"),
        ("SerialNumber", "{.serialnumber}"),
        ("UUID", "{.uuid}"),
        ("WakeUpType", "{.wakeUpType}"),
        ("SKUNumber", "{.skuNumber}"),
    ),
)
SIDEROLINK_STATUS = ResourceType(
    name="SiderolinkStatuses.siderolink.talos.dev",
    singular="SiderolinkStatus",
    namespace="config",
    columns=(("Host", "{.host}"), ("Connected", "{.connected}")),
)
LINK_SPEC = ResourceType(name="LinkSpecs.net.talos.dev", singular="LinkSpec", namespace="network", is_sensitive=True)
SIDEROLINK_CONFIG = ResourceType(
    name="SiderolinkConfigs.siderolink.talos.dev",
    singular="SiderolinkConfig",
    namespace="config",
    columns=(("API Endpoint", "{.apiEndpoint}"), ("Tunnel", "{.tunnel}")),
    is_sensitive=True,
)
SIDEROLINK_TUNNEL = ResourceType(
    name="SiderolinkTunnels.siderolink.talos.dev",
    singular="SiderolinkTunnel",
    namespace="config",
    columns=(
        ("API Endpoint", "{.apiEndpoint}"),
        ("Interface name", "{.linkName}"),
        ("MTU", "{.mtu}"),
        ("Node address", "{.nodeAddress}"),
    ),
    is_sensitive=True,
)
MACHINE_CONFIG = ResourceType(
    name="MachineConfigs.config.talos.dev", singular="MachineConfig", namespace="config", is_sensitive=True
)

MACHINE_TYPES = (
    LINK_STATUS,
    ADDRESS_STATUS,
    HOSTNAME_STATUS,
    SYSTEM_INFORMATION,
    SIDEROLINK_STATUS,
    LINK_SPEC,
    SIDEROLINK_CONFIG,
    SIDEROLINK_TUNNEL,
    MACHINE_CONFIG,
)
"""The types of every machine."""
