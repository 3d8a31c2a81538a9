"""Lists and watches of selected resources, and resumed watches, by another implementation of gRPC."""

from functools import partial
from typing import Any

import anyio
import grpc
import pytest

from siderolink.client.maintenance import MaintenanceApi, ResourceSpec, state_service
from siderolink.common.pb.cosi import resource as cosi
from tests.support.machine_api import STATE, MachineClient, status_of
from tests.support.turns import counting_turns
from tests.unit.maintenance.test_api import WIDGET, ask, kinds, serving, watched

pytestmark = pytest.mark.anyio


async def test_a_list_and_a_watch_of_some_by_label_and_by_pattern() -> None:
    def queried(client: MachineClient, **options: Any) -> list[str]:
        request = cosi.ListRequest(type=WIDGET.name, namespace="things", options=cosi.ListOptions(**options))
        answers = [cosi.ListResponse.parse(data).resource for data in client.stream(f"{STATE}List", request)]
        return [found.metadata.id for found in answers if found and found.metadata]

    red = cosi.LabelQuery(terms=[cosi.LabelTerm(key="colour", op=cosi.LabelTermOperation.EQUAL, value=["red"])])
    async with serving() as api:
        api.resources.define(WIDGET)
        for name, colour in {"one": "red", "two": "blue", "three": "red"}.items():
            api.resources.put(WIDGET, name, ResourceSpec(b"", {}), labels={"colour": colour})
        assert await ask(api, partial(queried, label_query=[red])) == ["one", "three"]
        assert await ask(api, partial(queried, id_query=cosi.IdQuery(regexp="^t(w|h)"))) == ["three", "two"]
        assert await ask(api, partial(queried, label_query=[red], id_query=cosi.IdQuery(regexp="^t"))) == ["three"]
        options = cosi.WatchOptions(bootstrap_contents=True, label_query=[red])
        _, first, second, end = await ask(api, partial(watched, count=4, options=options, api_version=1))
        assert [event.resource.metadata.id for event in (*first, *second)] == ["one", "three"]
        assert first[0].resource.metadata.labels == {"colour": "red"}
        assert kinds(end) == [("BOOTSTRAPPED", "undefined")]


async def test_a_watch_goes_on_where_another_ended() -> None:
    async with serving() as api:
        api.resources.define(WIDGET)
        api.resources.put(WIDGET, "one", ResourceSpec(b"", {}))
        start = cosi.WatchOptions(bootstrap_bookmark=True)
        _, [mark] = await ask(api, partial(watched, count=2, options=start, api_version=1))
        assert kinds([mark]) == [("NOOP", "undefined")]
        api.resources.put(WIDGET, "one", ResourceSpec(b"", {"size": 1}))
        api.resources.remove(WIDGET, "one")
        again = cosi.WatchOptions(start_from_bookmark=mark.bookmark)
        _, [updated], [destroyed] = await ask(api, partial(watched, count=3, options=again))
        assert kinds([updated, destroyed]) == [("UPDATED", "2"), ("DESTROYED", "2")]
        assert updated.old.metadata.version == "1"
        later = cosi.WatchOptions(start_from_bookmark=updated.bookmark)
        _, [last] = await ask(api, partial(watched, count=2, options=later))
        assert last == destroyed
        _, [last] = await ask(api, partial(watched, count=2, options=later, id="one"))
        assert last == destroyed
        _, [last] = await ask(api, partial(watched, count=2, options=cosi.WatchOptions(tail_events=1)))
        assert last == destroyed
        _, [last] = await ask(api, partial(watched, count=2, options=cosi.WatchOptions(tail_events=1), id="one"))
        assert last == destroyed


@pytest.mark.parametrize("is_aggregated", [False, True])
async def test_the_contents_of_a_watch_are_made_in_many_turns(is_aggregated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host may have thousands of addresses and routes, and its WireGuard runs on the same loop."""
    count = 300
    async with serving() as api, counting_turns() as turns:
        api.resources.define(WIDGET)
        for number in range(count):
            api.resources.put(WIDGET, f"{number:03}", ResourceSpec(b"", {"size": number}))
        monkeypatch.setattr(state_service, "message_of", turns.counted(state_service.message_of))
        options = cosi.WatchOptions(bootstrap_contents=True, aggregated=is_aggregated)
        answers = 2 if is_aggregated else 1 + count
        _, *found = await ask(api, partial(watched, count=answers, options=options))
        assert [event.resource.metadata.id for events in found for event in events] == [f"{n:03}" for n in range(count)]
    assert turns.total == count
    assert turns.most <= 4


async def test_watches_are_bounded_in_number_and_end_with_their_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_service, "MAX_WATCHES", 2)

    def watch_twice_and_once_more(client: MachineClient) -> None:
        request = cosi.WatchRequest(type=WIDGET.name, namespace="things")
        held = [client.stream(f"{STATE}Watch", request) for _ in range(2)]
        for stream in held:
            next(stream)
        with pytest.raises(grpc.RpcError) as caught:
            next(client.stream(f"{STATE}Watch", request))
        assert status_of(caught.value) == (
            "RESOURCE_EXHAUSTED",
            "too many watches are open on this machine; close some first",
        )
        for stream in held:
            stream.cancel()

    async with serving() as api:
        api.resources.define(WIDGET)
        await ask(api, watch_twice_and_once_more)
        await no_watches(api)
        for _ in range(3):
            assert await ask(api, partial(watched, count=1)) == [[]]
        await no_watches(api)


async def no_watches(api: MaintenanceApi) -> None:
    with anyio.fail_after(30):
        while api.resources.watches:
            await anyio.sleep(0.01)
