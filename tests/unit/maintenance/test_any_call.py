"""Calls that a stranger makes up: each is answered or refused as such, and never an internal error."""

from collections.abc import Iterator

import grpc
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siderolink.client.maintenance import ApplyAnswer, ApplyRequest, MachineHooks, serve_maintenance
from siderolink.client.maintenance.roles import METHODS
from siderolink.common.pb.cosi import resource as cosi
from tests.support.machine_api import MACHINE, STATE, MachineClient, machine_client, status_of

REFUSALS = ("INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNIMPLEMENTED", "FAILED_PRECONDITION")
WORDS = st.sampled_from(["LinkStatuses.net.talos.dev", "LinkSpecs.net.talos.dev", "network", "lo", "meta", ""]) | st.text(
    max_size=9
)
TERMS = st.builds(
    cosi.LabelTerm,
    key=WORDS,
    op=st.integers(-1, 9).map(cosi.LabelTermOperation),
    value=st.lists(WORDS, max_size=2),
    invert=st.booleans(),
)
QUERIES = st.lists(st.builds(cosi.LabelQuery, terms=st.lists(TERMS, max_size=2)), max_size=2)
IDS = st.none() | st.builds(cosi.IdQuery, regexp=st.text("(a|l+o)*[]^$\\d{1,}", max_size=12))
LISTS = st.builds(
    cosi.ListRequest,
    namespace=WORDS,
    type=WORDS,
    options=st.none() | st.builds(cosi.ListOptions, label_query=QUERIES, id_query=IDS),
)
WATCHES = st.builds(
    cosi.WatchRequest,
    namespace=WORDS,
    type=WORDS,
    id=st.none() | WORDS,
    api_version=st.integers(-1, 2),
    options=st.none()
    | st.builds(
        cosi.WatchOptions,
        bootstrap_contents=st.booleans(),
        tail_events=st.integers(-3, 3),
        label_query=QUERIES,
        id_query=IDS,
        aggregated=st.booleans(),
        start_from_bookmark=st.none() | st.binary(max_size=17),
        bootstrap_bookmark=st.booleans(),
    ),
)
CALLS = (
    st.tuples(st.just(f"{STATE}List"), LISTS.map(bytes))
    | st.tuples(st.just(f"{STATE}Watch"), WATCHES.map(bytes))
    | st.tuples(
        st.sampled_from([f"{STATE}Get", f"{STATE}List", f"{STATE}Watch", f"{MACHINE}ApplyConfiguration", f"{MACHINE}Reset"])
        | st.sampled_from(sorted(METHODS)),
        st.binary(max_size=60),
    )
)


@pytest.fixture(scope="module")
def client() -> Iterator[MachineClient]:
    async def apply(request: ApplyRequest) -> ApplyAnswer:
        return ApplyAnswer()

    with start_blocking_portal() as portal:
        hooks = MachineHooks(apply_configuration=apply)
        with portal.wrap_async_context_manager(serve_maintenance(hooks, node_uuid="", port=0)) as api:
            assert api.port is not None
            with machine_client("127.0.0.1", api.port) as client:
                yield client


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CALLS)
def test_any_call_is_answered_or_refused(client: MachineClient, call: tuple[str, bytes]) -> None:
    path, request = call
    assert ending(client, path, request) in (None, *REFUSALS)
    assert client.version().messages


def ending(client: MachineClient, path: str, request: bytes) -> str | None:
    """The status of a refusal; of a watch, the first answer is all that comes for sure."""
    stream = client.channel.unary_stream(path)(request, timeout=10)
    try:
        if path != f"{MACHINE}Events":  # of which there are none
            next(stream, None)
    except grpc.RpcError as error:
        return status_of(error)[0]
    finally:
        stream.cancel()
    return None
