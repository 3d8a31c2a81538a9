"""`--netns`: the interface in one network namespace, its datagrams and calls in another."""

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_interface
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal

import siderolink
from siderolink.client import InterfaceRepaired, Link
from siderolink.common.errors import ConfigurationError, InterfaceInUseError
from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import DeviceConfig, DeviceKind
from siderolink.common.wireguard.opening import open_device
from siderolink.server import ReportOptions, Server
from tests.support.commands import COMMAND
from tests.support.netns import Namespace
from tests.support.serving import API, TOKEN, served
from tests.support.topology import SERVER_V4, Net, direct

DEVICE: DeviceKind = "userspace"
"""Of both ends; tests/kernel runs the same tests with another."""
URL = f"grpc://{API}?jointoken={TOKEN}"


@contextmanager
def linked(net: Net, server_inner: Namespace, machine_inner: Namespace, query: str) -> Iterator[tuple[Link, BlockingPortal]]:
    server = Server(
        api_listen=API,
        wireguard_endpoints=[f"{SERVER_V4}:51820"],
        join_token=TOKEN,
        device=DEVICE,
        namespace=server_inner.name,
        reports=ReportOptions(event_sink_port=8090, log_port=8092),
        overlay_ports=(),
    )
    machine = siderolink.connect(URL + query, uuid=str(uuid.uuid4()), device=DEVICE, namespace=machine_inner.name)
    with net.server.portal() as there, net.machine.portal() as here:
        with there.wrap_async_context_manager(server), here.wrap_async_context_manager(machine) as link:
            yield link, here


def answers(namespace: Namespace, address: object) -> bool:
    return " 0 received" not in namespace.run(["ping", "-c3", "-i0.05", "-W20", "-s1000", str(address)], check=False)


@pytest.mark.parametrize("query", ["", "&grpc_tunnel=true"], ids=["udp", "tunnel"])
def test_interfaces_of_links_can_be_in_other_namespaces(query: str) -> None:
    with direct() as net, Namespace("overlay") as far, Namespace("overlay") as near, linked(net, far, near, query) as (link, _):
        for inner in (far, near):
            assert len(inner.interfaces() - {"lo"}) == 1
        assert net.server.interfaces() == net.machine.interfaces() == {"lo", "eth0"}
        assert answers(near, link.server_address)
        assert answers(far, link.address)
        # listeners on the overlay, and the firewall, are in the same namespace
        assert "8090" in far.run(["ss", "-ltn"])
        assert "8090" not in net.server.run(["ss", "-ltn"])
        assert "siderolink-siderolink" in far.run(["nft", "list", "tables"])
        assert net.server.run(["nft", "list", "tables"]) == ""


def test_an_interface_is_repaired_where_it_is() -> None:
    with direct() as net, Namespace("overlay") as far, Namespace("overlay") as near, linked(net, far, near, "") as (link, here):
        name = link.interface
        assert name is not None
        near.set_link(name, up=False)
        here.call(wait_for_repair, link)
        assert answers(near, link.server_address)


async def wait_for_repair(link: Link) -> None:
    async for event in link.events():
        if isinstance(event, InterfaceRepaired):
            return


def test_an_invalid_namespace_is_refused() -> None:
    key = PrivateKey.generate()
    with Namespace("outer") as outer, Namespace("inner") as inner, outer.portal() as portal:
        inner.run(["ip", "link", "add", "ours", "type", "veth"])
        for namespace, error in (("nowhere", ConfigurationError), (inner.name, InterfaceInUseError)):
            config = DeviceConfig(name="ours", private_key=key, addresses=(ip_interface("fd00::1/64"),), namespace=namespace)
            context = open_device(DEVICE, config, lambda event: None)
            with pytest.raises(error), portal.wrap_async_context_manager(context):
                raise AssertionError
        assert outer.interfaces() == {"lo"}
        assert inner.interfaces() == {"lo", "ours", "veth0"}


def test_by_the_command_line(tmp_path: Path) -> None:
    environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path / "run")}
    with direct() as net, Namespace("overlay") as far, Namespace("overlay") as near:
        with served(net.server, tmp_path, "--netns", far.name, "--device", DEVICE) as server:
            join = [*COMMAND, "join", URL, "--uuid", str(uuid.uuid4()), "--netns", near.name, "--device", DEVICE]
            net.machine.popen(join, env=environment, stdout=subprocess.DEVNULL)
            server.wait_for("is up")
            [status] = [one for one in json.loads(server.command(["status", "--json"])) if one["role"] == "server"]
            [peer] = status["peers"]
            assert answers(far, peer["allowed_ips"][0].partition("/")[0])
            assert near.interfaces() == {"lo", "siderolink"}
            said = net.machine.run([*join, "--maintenance-api"], check=False, env=environment)
            assert "--netns" in said
