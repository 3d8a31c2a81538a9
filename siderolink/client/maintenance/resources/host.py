"""Keeps the resources that describe the host up to date. The kernel reports changes; nothing is polled.

Netlink reports links, addresses and routes; the kernel's device events report disks; the host name is a change of
``/proc/sys/kernel/hostname``, which poll(2) reports as an exceptional condition.
"""

import asyncio
import logging
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.lowlevel

from siderolink.client.maintenance.host.disks import read_disks
from siderolink.client.maintenance.host.proc import PROC, read_text
from siderolink.client.maintenance.host.smbios import inventory, system_information
from siderolink.client.maintenance.resources import definitions as types
from siderolink.client.maintenance.resources import specs
from siderolink.client.maintenance.resources.kernel_network import describe
from siderolink.client.maintenance.resources.spec import ResourceSpec
from siderolink.client.maintenance.resources.store import ResourceStore
from siderolink.common.errors import SideroLinkError
from siderolink.common.netlink import HostNetwork, NetworkUpdate, follow_network
from siderolink.common.readers import read_on
from siderolink.common.tasks import background_tasks, in_thread
from siderolink.common.text import host_name

log = logging.getLogger("siderolink")

HOSTNAME: Final = PROC / "sys" / "kernel" / "hostname"
SECURE_BOOT: Final = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
_DEVICE_EVENTS: Final = 1
_KOBJECT_UEVENT: Final = 15
_RECEIVE_BYTES: Final = 1 << 16
_QUIET_SECONDS: Final = 0.05
"""Pause between two readings of a host that changes continuously."""
_CMDLINE_BYTES: Final = 64 * 1024
_MESSAGES_AT_ONCE: Final = 64
_RESOURCES_AT_ONCE: Final = 128
_PAUSE_FACTOR: Final = 10
_LONGEST_PAUSE: Final = 10.0
_RETRY_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Source:
    """A source of changes, and how to read it into the store."""

    changes: Callable[[asyncio.Event], Any]
    """A context manager that sets the event after each possible change."""
    refresh: Callable[[ResourceStore], Coroutine[Any, Any, None]]


async def keep_host_resources(
    store: ResourceStore,
    *,
    node_uuid: str,
    tag: str = "",
    platform: str = "metal",
    task_status: "anyio.abc.TaskStatus[None]" = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Keep the store up to date. Never returns; started once the store is filled. `tag` and `platform` are the machine's."""
    store.put(types.MACHINE_STATUS, "machine", specs.machine_status())
    if tag:
        store.put(types.VERSION, "version", specs.version(tag))
    await _read_once(store, node_uuid)
    sources = {
        "the disks": _Source(_device_events, _read_disks),
        "the host's name": _Source(_hostname_changes, partial(_read_hostname, platform=platform)),
    }
    async with background_tasks() as tasks:
        await tasks.start(_supervise, "the network", partial(_keep_network, store))
        for name, source in sources.items():
            await tasks.start(_supervise, name, partial(_follow, store, source))
        task_status.started()
        await anyio.sleep_forever()


async def _supervise(
    name: str, keep: Callable[[Callable[[], None]], Awaitable[None]], *, task_status: "anyio.abc.TaskStatus[None]"
) -> None:
    """Run one part and restart it after a failure, without effect on the others and the link."""
    is_started = False

    def started() -> None:
        nonlocal is_started
        if not is_started:
            is_started = True
            task_status.started()

    while True:
        try:
            await keep(started)
        except (OSError, SideroLinkError) as error:
            log.warning("the maintenance API cannot follow %s; retrying: %s", name, error)
        except Exception:
            log.exception("the maintenance API cannot follow %s; retrying", name)
        started()
        await anyio.sleep(_RETRY_SECONDS)


async def _follow(store: ResourceStore, source: _Source, started: Callable[[], None]) -> None:
    changed = asyncio.Event()
    async with source.changes(changed):
        await source.refresh(store)
        started()
        while True:
            await changed.wait()
            changed.clear()
            await source.refresh(store)
            await anyio.sleep(_QUIET_SECONDS)


async def _read_once(store: ResourceStore, node_uuid: str) -> None:
    """Read what cannot change while the program runs."""
    found = await in_thread(system_information, node_uuid)
    store.put(types.SYSTEM_INFORMATION, "systeminformation", specs.system_information(found))
    processors, modules = await in_thread(inventory)
    store.replace(types.PROCESSOR, {name: specs.processor(spec) for name, spec in processors.items()})
    store.replace(types.MEMORY_MODULE, {name: specs.memory_module(spec) for name, spec in modules.items()})
    cmdline = read_text(PROC / "cmdline", _CMDLINE_BYTES).strip()
    store.put(types.KERNEL_CMDLINE, "cmdline", specs.kernel_cmdline(cmdline))
    # in a thread, because the firmware reads its variables
    store.put(types.SECURITY_STATE, "securitystate", await in_thread(_security))


def _security() -> ResourceSpec:
    enforcing = read_text(Path("/sys/fs/selinux/enforce"), 8).strip()
    try:
        secure = SECURE_BOOT.read_bytes()[-1:] == b"\x01"
    except OSError:
        secure = False
    return specs.security_state(
        secure_boot=secure,
        se_linux=2 if enforcing == "1" else 1 if enforcing == "0" else 0,
        fips=read_text(PROC / "sys" / "crypto" / "fips_enabled", 8).strip() == "1",
        signed_modules=read_text(Path("/sys/module/module/parameters/sig_enforce"), 8).strip() == "Y",
    )


async def _keep_network(store: ResourceStore, started: Callable[[], None]) -> None:
    newest: list[HostNetwork] = []
    changed = asyncio.Event()

    def on_update(update: NetworkUpdate) -> None:
        newest[:] = [update.network]
        changed.set()

    async with background_tasks() as tasks:
        tasks.start_soon(follow_network, on_update)
        while True:
            await changed.wait()
            changed.clear()
            began_at = anyio.current_time()
            found = await in_thread(describe, newest.pop())
            await _replace(store, types.LINK_STATUS, found.links)
            await _replace(store, types.ADDRESS_STATUS, found.addresses)
            await _replace(store, types.ROUTE_STATUS, found.routes)
            store.replace(types.NODE_ADDRESS, found.node_addresses)
            started()
            # describing many routes holds the interpreter's lock, so other threads wait
            await anyio.sleep(min(_PAUSE_FACTOR * (anyio.current_time() - began_at), _LONGEST_PAUSE))


async def _replace(store: ResourceStore, kind: types.ResourceType, found: Mapping[str, ResourceSpec]) -> None:
    """Replace all resources of a type, with pauses for other tasks: there may be thousands."""
    gone = [resource.id for resource in store.list(kind) if resource.id not in found]
    for number, name in enumerate((*gone, *found)):
        if number % _RESOURCES_AT_ONCE == _RESOURCES_AT_ONCE - 1:
            await anyio.lowlevel.checkpoint()
        if name in found:
            store.put(kind, name, found[name])
        else:
            store.remove(kind, name)


async def _read_disks(store: ResourceStore) -> None:
    found = await in_thread(read_disks)
    store.replace(types.DISK, {name: specs.disk(spec) for name, spec in found.items()})


async def _read_hostname(store: ResourceStore, platform: str) -> None:
    name = host_name()
    store.put(types.HOSTNAME_STATUS, "hostname", specs.hostname_status(name))
    store.put(types.PLATFORM_METADATA, "platformmetadata", specs.platform_metadata(platform, name))


@asynccontextmanager
async def _device_events(changed: asyncio.Event) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    try:
        messages = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _KOBJECT_UEVENT)
    except OSError as error:  # some sandboxes have none
        log.debug("disk changes are not reported on this host: %s", error)
        yield
        return
    with messages:
        messages.bind((0, _DEVICE_EVENTS))
        loop.add_reader(messages, _drain, messages, changed)
        try:
            yield
        finally:
            loop.remove_reader(messages)


def _drain(messages: socket.socket, changed: asyncio.Event) -> None:
    """Discard the messages and report a change: the state is read from the kernel."""
    for _ in range(_MESSAGES_AT_ONCE):
        try:
            messages.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            break
        except OSError:  # the kernel dropped messages, so something changed
            read_on(asyncio.get_running_loop(), messages, _drain, messages, changed)
    changed.set()


@asynccontextmanager
async def _hostname_changes(changed: asyncio.Event) -> AsyncIterator[None]:
    """The file is always readable, so wait for its exceptional condition with a separate epoll."""
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        try:
            file = stack.enter_context(HOSTNAME.open("rb", buffering=0))
        except OSError:
            yield
            return
        poller = stack.enter_context(select.epoll())

        def on_change() -> None:
            poller.poll(0)  # may be empty: the event loop's own poll has consumed the event
            changed.set()

        poller.register(file, select.EPOLLPRI)
        loop.add_reader(poller.fileno(), on_change)
        stack.callback(loop.remove_reader, poller.fileno())
        yield
