"""Configurations applied through the API: the effect of each mode, reversals, and what never changes anything."""

import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from grpclib import GRPCError, Status

from siderolink.client.config import MachineSettings
from siderolink.client.link.supervisor import Verdict
from siderolink.client.maintenance import ApplyRequest, ConfigurationKeeper, MetaStore, ResourceStore
from siderolink.client.maintenance.configuration import difference, duration
from siderolink.client.maintenance.hooks import ApplyMode
from siderolink.client.maintenance.meta import MAX_BYTES
from siderolink.client.maintenance.resources.definitions import MACHINE_CONFIG, META_KEY
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.talos.resource.definitions.config import MachineConfigSpec
from siderolink.common.pb.talos.resource.definitions.runtime import MetaKeySpec

if TYPE_CHECKING:
    from siderolink.common.pb.machine import ConfigLoadErrorEvent

pytestmark = pytest.mark.anyio

JOIN = b"apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: grpc://192.0.2.1:4000?jointoken=a-secret\n"
SINK = b'apiVersion: v1alpha1\nkind: EventSinkConfig\nendpoint: "[fdae::1]:8090"\n'
OTHER = b'apiVersion: v1alpha1\nkind: EventSinkConfig\nendpoint: "[fdae::1]:9999"\n'


class Machine:
    """A configuration keeper, and what it applied."""

    def __init__(self, path: Path | None = None) -> None:
        self.used: list[MachineSettings] = []
        self.tries = 0
        self.refusals: list[ConfigLoadErrorEvent] = []
        self.verdict = Verdict(outcome="applied")
        self.resources = ResourceStore()
        self.keeper = ConfigurationKeeper(
            self.resources, self.use, path=path, on_refusal=self.refusals.append, revert_again=0.02
        )

    async def use(self, settings: MachineSettings) -> Verdict:
        self.tries += 1
        await anyio.sleep(0.01)
        if not self.verdict.is_refused:
            self.used.append(settings)
        return self.verdict

    async def apply(self, data: bytes, mode: ApplyMode = "auto", **options: object) -> tuple[tuple[str, ...], str, str]:
        fields = {"dry_run": False, "try_timeout": None, **options}
        answer = await self.keeper.apply(ApplyRequest(data=data, mode=mode, **fields))  # type: ignore[arg-type]
        return answer.warnings, answer.mode, answer.details

    async def refusal(self, data: bytes, mode: ApplyMode = "auto", **options: object) -> tuple[Status, str]:
        with pytest.raises(GRPCError) as caught:
            await self.apply(data, mode, **options)
        return caught.value.status, caught.value.message or ""

    def shown(self, name: str) -> bytes | None:
        found = self.resources.get(MACHINE_CONFIG, name)
        return None if found is None else MachineConfigSpec.parse(found.spec.proto).yaml_marshalled


@asynccontextmanager
async def running(machine: Machine) -> AsyncIterator[Machine]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(machine.keeper.run)
        yield machine
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("mode", ["auto", "reboot", "no-reboot"])
async def test_an_applied_configuration_is_in_force_and_stored(mode: ApplyMode) -> None:
    machine = Machine()
    assert machine.shown("v1alpha1") is None
    _, chosen, details = await machine.apply(JOIN, mode)
    assert (chosen, details) == ("no-reboot", "Applied configuration without a reboot")
    assert machine.shown("v1alpha1") == machine.shown("persistent") == JOIN
    assert len(machine.used) == 1
    found = machine.resources.get(MACHINE_CONFIG, "v1alpha1")
    assert found is not None
    assert dict(found.annotations) == {"talos.dev/yaml-spec": "1"}


async def test_a_refused_configuration_changes_nothing_and_is_reported() -> None:
    machine = Machine()
    await machine.apply(JOIN)
    assert await machine.refusal(b"# nothing") == (Status.INVALID_ARGUMENT, "config not found")
    assert await machine.refusal(JOIN + b"token: a-secret\n") == (
        Status.INVALID_ARGUMENT,
        "unknown keys found during decoding:\ntoken: a-secret\n",
    )
    machine.verdict = Verdict(outcome="refused", reason="the server refused the join")
    assert await machine.refusal(SINK) == (Status.FAILED_PRECONDITION, "nothing was changed: the server refused the join")
    assert machine.shown("v1alpha1") == machine.shown("persistent") == JOIN
    assert len(machine.used) == 1
    # readers can follow the events: values are not in them
    assert [event.error for event in machine.refusals] == ["config not found", "unknown keys found during decoding:"]


async def test_a_configuration_without_a_join_url_keeps_the_current_one() -> None:
    machine = Machine()
    await machine.apply(JOIN)
    warnings, _, _ = await machine.apply(SINK)
    assert any("stays" in warning for warning in warnings)
    assert machine.used[-1].url is not None
    assert machine.used[-1].event_sink is not None
    text = machine.shown("v1alpha1") or b""
    assert b"kind: EventSinkConfig" in text
    assert b'kind: "SideroLinkConfig"' in text
    await machine.apply(text)  # what is shown can be applied again
    assert machine.used[-1] == machine.used[-2]


async def test_staged_is_for_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    machine = Machine(path)
    await machine.apply(JOIN)
    warnings, mode, details = await machine.apply(JOIN + b"---\n" + SINK, "staged")
    assert (warnings, mode, details) == ((), "staged", "Staged configuration to be applied after the next reboot")
    assert machine.shown("v1alpha1") == JOIN
    assert machine.shown("persistent") == JOIN + b"---\n" + SINK
    assert len(machine.used) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Machine(path)
    await again.keeper.load()
    assert again.used[0].event_sink is not None
    assert again.shown("v1alpha1") == again.shown("persistent") == JOIN + b"---\n" + SINK
    path.write_bytes(b"kind: [")
    broken = Machine(path)
    await broken.keeper.load()
    assert broken.used == []


async def test_a_try_is_taken_back_after_its_timeout() -> None:
    async with running(Machine()) as machine:
        await machine.apply(SINK)
        _, mode, details = await machine.apply(OTHER, "try", try_timeout=timedelta(seconds=0.2))
        assert mode == "try"
        assert details == (
            "Applied configuration without a reboot\n"
            "The config is applied in 'try' mode and will be automatically reverted back in 0.2s"
        )
        assert (machine.shown("v1alpha1"), machine.shown("persistent")) == (OTHER, SINK)
        with anyio.fail_after(30):
            while machine.shown("v1alpha1") != SINK:
                await anyio.sleep(0.01)
        assert machine.used[2] == machine.used[0]
        assert machine.shown("persistent") == SINK


async def test_a_try_that_cannot_be_taken_back_at_once_is_taken_back_later() -> None:
    """The previous server does not answer when the trial ends."""
    async with running(Machine()) as machine:
        await machine.apply(SINK)
        await machine.apply(OTHER, "try", try_timeout=timedelta(seconds=0.05))
        machine.verdict = Verdict(outcome="refused", reason="no answer")
        with anyio.fail_after(30):
            while machine.tries < 4:
                await anyio.sleep(0.01)
            assert machine.shown("v1alpha1") == OTHER
            machine.verdict = Verdict(outcome="applied")
            while machine.shown("v1alpha1") != SINK:
                await anyio.sleep(0.01)
        assert machine.used[-1] == machine.used[0]


async def test_a_try_of_a_first_configuration_goes_back_to_none() -> None:
    async with running(Machine()) as machine:
        await machine.apply(SINK, "try", try_timeout=timedelta(seconds=0.1))
        with anyio.fail_after(30):
            while machine.shown("v1alpha1") is not None:
                await anyio.sleep(0.01)
        assert machine.used[-1] == MachineSettings()
        assert machine.shown("persistent") is None


async def test_any_other_mode_ends_a_try_before_its_data_is_read() -> None:
    async with running(Machine()) as machine:
        await machine.apply(SINK)
        await machine.apply(OTHER, "try", try_timeout=timedelta(seconds=0.3))
        await machine.refusal(b"kind: [")
        await anyio.sleep(0.5)
        assert machine.shown("v1alpha1") == OTHER
        assert await machine.refusal(OTHER, "try", try_timeout=timedelta(seconds=-1)) == (
            Status.INVALID_ARGUMENT,
            "the timeout of a try must not be negative",
        )


async def test_a_dry_run_says_what_would_change() -> None:
    machine = Machine()
    await machine.apply(SINK)
    _, mode, details = await machine.apply(OTHER, dry_run=True)
    assert mode == "no-reboot"
    assert details.startswith(
        "Dry run summary:\nApplied configuration without a reboot (skipped in dry-run).\nConfig diff:\n\n--- a\n+++ b\n"
    )
    assert '-endpoint: "[fdae::1]:8090"\n+endpoint: "[fdae::1]:9999"\n' in details
    assert (await machine.apply(SINK, dry_run=True))[2].endswith("Config diff:\n\nNo changes.")
    assert machine.shown("v1alpha1") == SINK
    assert len(machine.used) == 1
    await machine.apply(JOIN)
    _, _, details = await machine.apply(SINK, dry_run=True, by_admin=False)
    assert "a-secret" not in details


async def test_one_configuration_is_applied_at_a_time() -> None:
    machine = Machine()
    refused: list[tuple[Status, str]] = []

    async def second() -> None:
        refused.append(await machine.refusal(SINK))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(machine.apply, JOIN)
        tasks.start_soon(second)
    assert refused == [(Status.FAILED_PRECONDITION, "another apply configuration is already in progress")]
    assert machine.shown("v1alpha1") == JOIN


def test_differences_and_durations() -> None:
    assert len(difference("a\n" * 200_000, "b\n" * 200_000)) < 100_000
    assert difference("a", "a\n") == "--- a\n+++ b\n@@ -1 +1 @@\n-a\n+a\n"
    assert [duration(timedelta(seconds=seconds)) for seconds in (1, 60, 90, 3600, 86400, 0.5)] == [
        *("1s", "1m0s", "1m30s", "1h0m0s", "24h0m0s", "0.5s")
    ]


# META


def shown_meta(resources: ResourceStore) -> dict[str, str]:
    return {found.id: MetaKeySpec.parse(found.spec.proto).value for found in resources.list(META_KEY)}


async def test_every_meta_key_is_kept_as_it_was_written(tmp_path: Path) -> None:
    path, resources = tmp_path / "meta", ResourceStore()
    store = MetaStore(resources, path)
    for key in range(256):
        await store.write(key, b"value of %d" % key)
    await store.write(16, b'{"Fingerprint":"00","Token":"t"}')
    await store.write(17, b"\xff\x00")
    await store.write(18, b"")
    assert await store.delete(12)
    assert not await store.delete(12)
    found = shown_meta(resources)
    assert len(found) == 255
    assert (found["0x10"], found["0x11"], found["0x12"]) == ('{"Fingerprint":"00","Token":"t"}', "\ufffd\0", "")
    again = ResourceStore()
    assert MetaStore(again, path).values[17] == b"\xff\x00"
    assert shown_meta(again) == found
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["meta"]


async def test_meta_is_bounded_and_what_cannot_be_written_down_changes_nothing(tmp_path: Path) -> None:
    store = MetaStore(ResourceStore(), tmp_path / "gone" / "meta")
    with pytest.raises(GRPCError) as caught:
        await store.write(1, b"x")
    assert caught.value.status is Status.INTERNAL
    assert not store.values
    store = MetaStore(ResourceStore())
    await store.write(1, bytes(MAX_BYTES // 2))
    with pytest.raises(GRPCError) as caught:
        await store.write(2, bytes(MAX_BYTES // 2))
    assert (caught.value.status, caught.value.message) == (Status.RESOURCE_EXHAUSTED, "meta write failed")
    assert list(store.values) == [1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"version": 2, "values": {}}',
        b'{"version": 1, "values": {"256": ""}}',
        b'{"version": 1, "values": []}',
    ],
)
def test_a_foreign_file_is_named_in_the_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "meta"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match=str(path)):
        MetaStore(ResourceStore(), path)
