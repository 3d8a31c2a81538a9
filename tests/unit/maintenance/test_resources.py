"""Resources without I/O: versions, watches, both forms of a spec, and the names by which clients find them."""

from collections import Counter
from functools import partial
from ipaddress import IPv6Address

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from siderolink import JoinURL
from siderolink.client.maintenance.resources import ResourceSpec, ResourceStore
from siderolink.client.maintenance.resources.definitions import (
    LINK_STATUS,
    MACHINE_CONFIG,
    MACHINE_TYPES,
    RESOURCE_DEFINITION,
    SIDEROLINK_CONFIG,
)
from siderolink.client.maintenance.resources.network import AddressFacts, LinkFacts, address_status, link_status
from siderolink.client.maintenance.resources.specs import (
    link_spec,
    machine_config,
    siderolink_config,
    siderolink_status,
    siderolink_tunnel,
)
from siderolink.client.maintenance.resources.store import WATCH_LIMIT, ChangeKind, WatchTooSlowError
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.talos.resource.definitions.network import LinkSpecSpec

pytestmark = pytest.mark.anyio

URL = JoinURL.parse("https://siderolink.example?jointoken=a-token&grpc_tunnel=true")
NODE = IPv6Address("fdae:41e4:649b:9304::7")

SCALARS = st.text(max_size=30) | st.integers() | st.booleans()
KEYS = st.text(min_size=1, max_size=20)
PLAIN = st.dictionaries(KEYS, SCALARS | st.lists(SCALARS, max_size=2), max_size=2)
VALUES = SCALARS | PLAIN | st.lists(SCALARS | PLAIN, max_size=3) | st.dictionaries(KEYS, PLAIN, max_size=2)


@settings(max_examples=100)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_yaml_and_fields_have_the_same_content(fields: dict[str, object]) -> None:
    assert yaml.safe_load(ResourceSpec(b"", fields).yaml()) == fields


def test_a_spec_never_shows_its_values() -> None:
    assert "a-token" not in repr(siderolink_config(URL))
    assert "a-token" not in repr(machine_config(b"token: a-token"))


# The bytes of the public messages, field by field, written out.
@pytest.mark.parametrize(
    ("spec", "proto", "text"),
    [
        (
            siderolink_status(URL, connected=True, link="siderolinktun", tunnel=True),
            b"\x0a\x12siderolink.example\x10\x01\x1a\x0dsiderolinktun\x20\x01",
            {"host": "siderolink.example", "connected": True, "linkName": "siderolinktun", "grpcTunnel": True},
        ),
        (
            siderolink_config(JoinURL.parse("grpc://192.0.2.1:4000?jointoken=t")),
            b"\x0a\x21grpc://192.0.2.1:4000?jointoken=t\x12\x0e192.0.2.1:4000\x1a\x01t\x20\x01",
            {
                "apiEndpoint": "grpc://192.0.2.1:4000?jointoken=t",
                "host": "192.0.2.1:4000",
                "joinToken": "t",
                "insecure": True,
                "tunnel": False,
            },
        ),
        (
            siderolink_tunnel(JoinURL.parse("grpc://a:1"), link="siderolinktun", mtu=1280, address=NODE, port=50888),
            b"\x0a\x0agrpc://a:1\x12\x0dsiderolinktun\x18\x80\x0a\x22\x16\x0a\x10" + NODE.packed + b"\x10\xc8\x8d\x03",
            {
                "apiEndpoint": "grpc://a:1",
                "linkName": "siderolinktun",
                "mtu": 1280,
                "nodeAddress": "[fdae:41e4:649b:9304::7]:50888",
            },
        ),
        (machine_config(b"kind: A\n---\n"), b"\x0a\x0ckind: A\n---\n", "kind: A\n---\n"),
        (
            address_status(
                AddressFacts(address="192.0.2.2/24", link_index=4, link="eth0", family=2, scope=0, flags=128, local="192.0.2.2")
            ),
            b"\x0a\x08\x0a\x04\xc0\x00\x02\x02\x10\x18\x12\x06\x0a\x04\xc0\x00\x02\x02\x30\x04\x3a\x04eth0\x40\x02\x50\x80\x01",
            {
                "address": "192.0.2.2/24",
                "local": "192.0.2.2",
                "linkIndex": 4,
                "linkName": "eth0",
                "family": "inet4",
                "scope": "global",
                "flags": "permanent",
            },
        ),
    ],
    ids=["status", "config", "tunnel", "machine config", "address"],
)
def test_specs_are_encoded_as_existing_machines_do(spec: ResourceSpec, proto: bytes, text: object) -> None:
    assert spec.proto == proto
    assert yaml.safe_load(spec.yaml()) == text


def test_a_link_has_the_kernels_values_and_a_link_spec_the_given_key() -> None:
    link = link_status(LinkFacts(index=2, type=1, flags=69699, mtu=1500, state=6, hardware=b"\x02\xfc\0\0\0\x01", carrier=True))
    assert link.proto.startswith(
        b"\x08\x02\x10\x01\x20\xc3\xa0\x04\x2a\x06\x02\xfc\x00\x00\x00\x01\x38\xdc\x0b\x50\x06\xb0\x01\x01"
    )
    assert yaml.safe_load(link.yaml())["hardwareAddr"] == "02:fc:00:00:00:01"
    assert yaml.safe_load(link.yaml())["flags"] == "UP,BROADCAST,RUNNING,MULTICAST,LOWER_UP"
    make = partial(link_spec, "siderolink", mtu=1280, server_key="k", server=NODE, endpoint="192.0.2.1:51820", keepalive=25)
    spec, key = make(private_key=None), PrivateKey.generate()
    assert "privateKey" not in spec.yaml()
    whole = make(private_key=key)
    assert yaml.safe_load(whole.yaml())["wireguard"]["privateKey"] == key.encode()
    found = LinkSpecSpec.parse(whole.proto).wireguard
    assert found is not None
    assert found.private_key == key.encode()
    assert key.encode() not in repr(whole)
    assert yaml.safe_load(spec.yaml())["wireguard"]["peers"][0]["allowedIPs"] == ["fdae:41e4:649b:9304::7/128"]


def test_every_type_is_defined_and_its_aliases_are_those_that_clients_use() -> None:
    store = ResourceStore()
    definitions = {found.id for found in store.list(RESOURCE_DEFINITION)}
    assert definitions >= {each.name.lower() for each in MACHINE_TYPES}
    assert LINK_STATUS.short_names == ("link", "links", "linkstatus", "ls")
    assert LINK_STATUS.all_names[:3] == ("linkstatuses", "linkstatuses.net", "linkstatuses.net.talos")
    assert SIDEROLINK_CONFIG.short_names == ("siderolinkconfig", "sc", "scs")
    wanted = ("links", "addresses", "hostname", "systeminformation", "siderolinkstatus", "linkspec", "machineconfig", "mc")
    count = Counter(name for each in MACHINE_TYPES for name in set(each.all_names))
    assert {name: count[name] for name in wanted} == dict.fromkeys(wanted, 1)


def spec(text: str) -> ResourceSpec:
    return ResourceSpec(text.encode(), {"text": text})


async def test_a_change_makes_a_version_and_no_change_makes_none() -> None:
    store = ResourceStore()
    watch = store.watch(LINK_STATUS, None)
    store.put(LINK_STATUS, "eth0", spec("a"))
    store.put(LINK_STATUS, "eth0", spec("a"))
    store.put(LINK_STATUS, "eth0", spec("b"))
    store.put(MACHINE_CONFIG, "v1alpha1", spec("other"))
    store.replace(LINK_STATUS, {"lo": spec("c")})
    changes = [await watch.next() for _ in range(4)]
    assert [(change.kind, change.resource.id, change.resource.version) for change in changes] == [
        (ChangeKind.CREATED, "eth0", 1),
        (ChangeKind.UPDATED, "eth0", 2),
        (ChangeKind.DESTROYED, "eth0", 2),
        (ChangeKind.CREATED, "lo", 1),
    ]
    assert changes[1].old is not None
    assert changes[1].old.spec == spec("a")
    assert changes[1].resource.created == changes[0].resource.created


async def test_a_slow_watch_is_ended_and_costs_bounded_memory() -> None:
    store = ResourceStore()
    slow = store.watch(LINK_STATUS, "eth0")
    for number in range(WATCH_LIMIT + 1):
        store.put(LINK_STATUS, "eth0", spec(str(number)))
    with pytest.raises(WatchTooSlowError):
        await slow.next()
    store.unwatch(slow)
    slow = store.watch(MACHINE_CONFIG, None)
    for number in range(8):
        store.put(MACHINE_CONFIG, "v1alpha1", machine_config(str(number).encode() * 200_000))
    with pytest.raises(WatchTooSlowError):
        await slow.next()
