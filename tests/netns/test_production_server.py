"""A machine by `siderolink join --maintenance-api` and the calls of the production server of this field, in their order.

The server's side of the link is ours. What it calls on the machine, and how it decodes the answers, is played by a client that
was made from the .proto files.
"""

import hashlib
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from siderolink.client.maintenance.resources.kernel_network import connector
from tests.netns.test_machine_command import UUID, Membership
from tests.support.machine_api import MACHINE, STATE, MachineClient, status_of
from tests.support.machine_stubs import Stubs, message
from tests.support.netns import Namespace
from tests.support.topology import Net, direct

if TYPE_CHECKING:
    from siderolink.server import JoinRequest

NETWORK, HARDWARE = "talos.resource.definitions.network", "talos.resource.definitions.hardware"
RUNTIME, BLOCK = "talos.resource.definitions.runtime", "talos.resource.definitions.block"
POLLED = {
    "HostnameStatuses.net.talos.dev": ("network", f"{NETWORK}.HostnameStatusSpec"),
    "LinkStatuses.net.talos.dev": ("network", f"{NETWORK}.LinkStatusSpec"),
    "RouteStatuses.net.talos.dev": ("network", f"{NETWORK}.RouteStatusSpec"),
    "NodeAddresses.net.talos.dev": ("network", f"{NETWORK}.NodeAddressSpec"),
    "Processors.hardware.talos.dev": ("hardware", f"{HARDWARE}.ProcessorSpec"),
    "MemoryModules.hardware.talos.dev": ("hardware", f"{HARDWARE}.MemoryModuleSpec"),
    "PlatformMetadatas.talos.dev": ("runtime", f"{RUNTIME}.PlatformMetadataSpec"),
    "MetaKeys.runtime.talos.dev": ("runtime", f"{RUNTIME}.MetaKeySpec"),
    "Versions.runtime.talos.dev": ("runtime", f"{RUNTIME}.VersionSpec"),
    "SecurityStates.talos.dev": ("runtime", f"{RUNTIME}.SecurityStateSpec"),
    "KernelCmdlines.runtime.talos.dev": ("runtime", f"{RUNTIME}.KernelCmdlineSpec"),
    "Disks.block.talos.dev": ("runtime", f"{BLOCK}.DiskSpec"),
    "SystemDisks.block.talos.dev": ("runtime", f"{BLOCK}.SystemDiskSpec"),
    "MachineStatuses.runtime.talos.dev": ("runtime", f"{RUNTIME}.MachineStatusSpec"),
}
EMPTY = ("ExtensionStatuses.runtime.talos.dev", "Diagnostics.runtime.talos.dev", "SystemDisks.block.talos.dev")
PUSHED = """\
apiVersion: v1alpha1
kind: EventSinkConfig
endpoint: "[fdae:41e4:649b:9303::1]:8090"
---
apiVersion: v1alpha1
kind: KmsgLogConfig
name: omni-kmsg
url: tcp://[fdae:41e4:649b:9303::1]:8092
---
apiVersion: v1alpha1
kind: RegistryAuthConfig
name: registry.example
username: user
password: secret
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path / "run"))
    with direct() as net:
        yield net


def by_stubs(work: Callable[[Stubs], Any]) -> Callable[[MachineClient], Any]:
    return lambda client: work(Stubs(client.channel))


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return status_of(caught.value)


def pending_round(stubs: Stubs, own: dict[str, str]) -> str:
    """What the server does with a pending machine, within ten seconds. Gives the unique token that it wrote."""
    [answer] = stubs.call("/storage.StorageService/Disks").messages
    assert not any(disk.system_disk for disk in answer.disks)
    links = stubs.resources("LinkStatuses.net.talos.dev", "network", f"{NETWORK}.LinkStatusSpec").values()
    physical = sorted(link.permanent_addr or link.hardware_addr for link in links if link.type == 1 and not link.kind)
    assert own["Fingerprint"] == hashlib.sha256(b"".join(physical)).hexdigest()
    token = f'{{"Fingerprint":"{"0" * 64}","Token":"{own["Token"]}"}}'
    [written] = stubs.call(f"{MACHINE}MetaWrite", key=16, value=token.encode()).messages
    assert written.ByteSize() == 0
    return token


def used_token(stubs: Stubs) -> str:
    """The settings with which the machine reports that it joins."""
    found = stubs.resources("UniqueMachineTokens.runtime.talos.dev", "runtime", f"{RUNTIME}.UniqueMachineTokenSpec")
    token: str = found["unique-machine-token"].token
    return token


def inventory(stubs: Stubs) -> None:
    """What the server reads of an accepted machine: definitions, watches, then a poll of each type."""
    definitions = stubs.resources("ResourceDefinitions.meta.cosi.dev", "meta", "cosi.resource.meta.ResourceDefinitionSpec")
    registered = {found.resource_type: found.default_namespace for found in definitions.values()}
    watches = []
    for name, (namespace, _) in POLLED.items():
        assert registered[name] == namespace
        stream = stubs.stream(f"{STATE}Watch", namespace=namespace, type=name, options={}, api_version=1)
        assert not next(stream).event
        watches.append(stream)
    [version] = stubs.call(f"{MACHINE}Version").messages
    assert version.version.tag == "v1.14.0"
    found = {name: stubs.resources(name, namespace, spec) for name, (namespace, spec) in POLLED.items()}
    for name in EMPTY:
        assert name in registered
    assert found["SystemDisks.block.talos.dev"] == {}
    assert found["SecurityStates.talos.dev"].keys() == {"securitystate"}
    assert found["HostnameStatuses.net.talos.dev"]["hostname"].hostname
    assert found["PlatformMetadatas.talos.dev"]["platformmetadata"].platform == "metal"
    assert any(cpu.core_count and cpu.max_speed for cpu in found["Processors.hardware.talos.dev"].values())
    assert any(module.size > 0 for module in found["MemoryModules.hardware.talos.dev"].values())
    assert found["KernelCmdlines.runtime.talos.dev"]["cmdline"].cmdline
    addresses = found["NodeAddresses.net.talos.dev"]["current"].addresses
    assert b"\xc0\x00\x02\x02" in [address.ip for address in addresses]
    for route in found["RouteStatuses.net.talos.dev"].values():
        assert route.HasField("destination") or route.HasField("gateway") or route.out_link_name
    status = stubs.stream(
        f"{STATE}Watch", namespace="runtime", type="MachineStatuses.runtime.talos.dev", id="machine", options={}
    )
    assert not next(status).event
    [event] = next(status).event
    machine = message(f"{RUNTIME}.MachineStatusSpec").FromString(event.resource.spec.proto_spec)
    assert (machine.stage, machine.status.ready, len(machine.status.unmet_conditions)) == (3, True, 0)
    [boot] = stubs.call(f"{MACHINE}Read", path="/proc/sys/kernel/random/boot_id")
    uuid.UUID(boot.bytes.decode().strip())
    for stream in (*watches, status):
        stream.cancel()


@contextmanager
def accepted(net: Net, *options: str) -> "Iterator[tuple[Membership, JoinRequest]]":
    """A machine after the server's round."""
    machine = Membership(net, *options)
    with machine.running():
        join = machine.next_join("monitoring the link")
        assert join.talos_version == "v1.14.0"
        # our server has bound the token that the machine made for itself: what names it stays the same
        own = json.loads(join.unique_token or "")
        began = time.monotonic()
        assert machine.ask(by_stubs(used_token)) == join.unique_token
        token = machine.ask(by_stubs(lambda stubs: pending_round(stubs, own)))
        join = machine.next_join()
        assert (join.node_uuid, join.unique_token) == (UUID, token)
        assert join.join_token  # without it, a server has no token for pushed settings
        assert machine.ask(by_stubs(used_token)) == token
        assert time.monotonic() - began < 30, "a machine that has to be asked again waits longer"
        yield machine, join


@pytest.mark.timeout(240)
def test_a_default_join_is_accepted_read_and_configured(net: Net, tmp_path: Path) -> None:
    with accepted(net) as (machine, _):
        machine.ask(by_stubs(inventory))
        machine.ask(by_stubs(push))
        # it has kept the join of its argument, and its link
        machine.ask(by_stubs(lambda stubs: stubs.call(f"{MACHINE}Version")))
        machine.ask(by_stubs(install))


def push(stubs: Stubs) -> None:
    """The settings that a server sends: to a machine that came by argument, without a SideroLinkConfig."""
    get = {"namespace": "config", "type": "MachineConfigs.config.talos.dev", "id": "v1alpha1", "options": {}}
    assert refusal(lambda: stubs.call(f"{STATE}Get", **get))[0] == "NOT_FOUND"
    [answer] = stubs.call(f"{MACHINE}ApplyConfiguration", data=PUSHED.encode(), mode=1).messages
    assert answer.mode == 2
    kept = stubs.call(f"{STATE}Get", **get).resource
    assert kept.metadata.annotations["talos.dev/yaml-spec"]
    spec = message("talos.resource.definitions.config.MachineConfigSpec").FromString(kept.spec.proto_spec)
    assert spec.yaml_marshalled == PUSHED.encode()
    cluster = b"version: v1alpha1\nmachine:\n  type: worker\ncluster: {}\n"
    status, text = refusal(lambda: stubs.call(f"{MACHINE}ApplyConfiguration", data=cluster, mode=1))
    assert (status, "runs no cluster" in text) == ("INVALID_ARGUMENT", True)


def install(stubs: Stubs) -> None:
    """The effect of a request to add the machine to a cluster."""
    assert refusal(lambda: stubs.call("/machine.ImageService/Pull", image_ref="factory.example/installer:v1.14.0"))[0] == (
        "FAILED_PRECONDITION"
    )


@pytest.mark.timeout(240)
def test_meta_outlives_a_restart_of_the_machine(net: Net, tmp_path: Path) -> None:
    meta = ("--meta", str(tmp_path / "meta"))
    with accepted(net, *meta) as (machine, join):
        machine.write(10, b"\x00raw")
        machine.write(12, b"machineLabels: {a: b}")
    again = Membership(net, *meta)
    with again.running():
        assert again.next_join("monitoring the link").unique_token == join.unique_token
        keys = again.ask(
            by_stubs(lambda stubs: stubs.resources("MetaKeys.runtime.talos.dev", "runtime", f"{RUNTIME}.MetaKeySpec"))
        )
        assert isinstance(keys, dict)
        assert {name: found.value for name, found in keys.items()} == {
            "0x0a": "\0raw",
            "0x0c": "machineLabels: {a: b}",
            "0x10": join.unique_token,
        }


@pytest.mark.timeout(240)
def test_links_addresses_routes_and_the_hosts_name_are_live(net: Net) -> None:
    machine = Membership(net)
    with machine.running():
        machine.next_join("monitoring the link")

        def look(stubs: Stubs) -> None:
            stream = stubs.stream(f"{STATE}Watch", namespace="network", type="RouteStatuses.net.talos.dev", options={})
            assert not next(stream).event
            run(net.machine, "ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.1", "metric", "77")
            await_event(stream, *(0, "inet4/192.0.2.1/198.51.100.0/24/77"))
            run(net.machine, "ip", "route", "add", "default", "via", "192.0.2.1")
            await_event(stream, *(0, "inet4/192.0.2.1//0"))
            routes = stubs.resources("RouteStatuses.net.talos.dev", "network", f"{NETWORK}.RouteStatusSpec")
            default = routes["inet4/192.0.2.1//0"]
            assert (default.HasField("destination"), default.gateway.ip, default.scope) == (False, b"\xc0\x00\x02\x01", 0)
            run(net.machine, "ip", "route", "del", "default")
            await_event(stream, *(2, "inet4/192.0.2.1//0"))
            stream.cancel()
            links = stubs.stream(f"{STATE}Watch", namespace="network", type="LinkStatuses.net.talos.dev", id="eth0", options={})
            assert not next(links).event
            await_event(links, *(0, "eth0"))
            run(net.machine, "ip", "link", "set", "eth0", "alias", "uplink")
            await_event(links, 1, "eth0")
            found = stubs.resources("LinkStatuses.net.talos.dev", "network", f"{NETWORK}.LinkStatusSpec")["eth0"]
            assert (found.alias, found.type, found.kind, found.operational_state) == ("uplink", 1, "veth", 6)
            links.cancel()

        machine.ask(by_stubs(look))


def run(namespace: Namespace, *command: str) -> None:
    namespace.run(list(command))


def await_event(stream: Any, event_type: int, name: str) -> None:
    """Others may come before it: an interface that has just been made brings routes of its own."""
    for answer in stream:
        if any((event.event_type, event.resource.metadata.id) == (event_type, name) for event in answer.event):
            return
    raise AssertionError(f"the stream ended before {name}")


def test_the_connector_is_read_from_the_driver(net: Net) -> None:
    assert net.machine.call(partial(connector, "eth0")) == 0, "twisted pair, as this driver says"
    assert net.machine.call(partial(connector, "lo")) == 255
    assert net.machine.call(partial(connector, "none")) == 255


DISK_PROGRAM = """
import anyio, subprocess, sys
from siderolink.client.maintenance.resources import ResourceStore
from siderolink.client.maintenance.resources.definitions import DISK
from siderolink.client.maintenance.resources.host import keep_host_resources

async def main():
    store = ResourceStore()
    async with anyio.create_task_group() as tasks:
        async def keep(*, task_status):
            await keep_host_resources(store, node_uuid="", task_status=task_status)
        await tasks.start(keep)
        attached = subprocess.run(["losetup", "-f", "--show", sys.argv[1]], capture_output=True, text=True)
        device = attached.stdout.strip()
        if attached.returncode:
            print("no loop device")
        else:
            with anyio.fail_after(30):
                while store.get(DISK, device.removeprefix("/dev/")) is None:
                    await anyio.sleep(0.01)
            subprocess.run(["losetup", "-d", device], check=True)
            with anyio.fail_after(30):
                while store.get(DISK, device.removeprefix("/dev/")) is not None:
                    await anyio.sleep(0.01)
            print("came and went")
        tasks.cancel_scope.cancel()

anyio.run(main)
"""


@pytest.mark.timeout(240)
def test_disks_come_and_go(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    done = subprocess.run([sys.executable, "-c", DISK_PROGRAM, str(image)], capture_output=True, text=True, check=False)
    if "no loop device" in done.stdout:
        pytest.skip("this host gives out no loop devices")
    assert done.stdout == "came and went\n", done.stderr
