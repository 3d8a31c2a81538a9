"""The programs that the demo of several servers starts; tests/netns/test_demo.py runs the whole demo."""

import pytest

from siderolink.cli.demo.programs import Service
from siderolink.common.errors import SideroLinkError

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": loop}) for loop in (False, True)], ids=["asyncio", "uvloop"]
)
async def test_a_server_that_does_not_start_is_reported_with_its_last_line() -> None:
    lines: list[str] = []
    service = Service(["serve", "--api-listen", "nonsense"], {}, lines.append)
    with pytest.raises(SideroLinkError, match="siderolink serve ended: ") as caught:
        async with service.running("serving"):
            pass
    assert lines[-1] in str(caught.value)
