"""`siderolink serve --keep-interface`: killed and started again, while the kernel goes on carrying the traffic."""

import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import siderolink
from tests.support.serving import API, TOKEN, served
from tests.support.topology import direct

PINGS = 200


def test_a_killed_server_takes_up_its_interface_and_no_packet_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_uuid = str(uuid.uuid4())
    machine = siderolink.connect(f"grpc://{API}?jointoken={TOKEN}", uuid=machine_uuid, device="kernel")
    with (
        direct() as net,
        served(net.server, tmp_path, "--device", "kernel", "--keep-interface") as server,
        net.machine.portal() as portal,
        portal.wrap_async_context_manager(machine) as link,
    ):
        server.wait_for("is up")
        key = net.server.run(["wg", "show", "siderolink", "public-key"])
        session = net.server.run(["wg", "show", "siderolink", "latest-handshakes"])
        command = ["ping", "-q", "-i0.05", f"-c{PINGS}", "-W10", str(link.server_address)]
        pings = net.machine.popen(command, stdout=subprocess.PIPE)
        server.kill()
        assert net.server.run(["wg", "show", "siderolink", "latest-handshakes"]) == session
        began = time.monotonic()
        server.start(until="serving")
        server.wait_for(machine_uuid)
        taken = time.monotonic() - began
        output, _ = pings.communicate(timeout=60)
        assert f"{PINGS} packets transmitted, {PINGS} received" in output
        assert net.server.run(["wg", "show", "siderolink", "public-key"]) == key
        assert net.server.run(["wg", "show", "siderolink", "latest-handshakes"]) == session
        with capsys.disabled():
            sys.stdout.write(f"\na killed server's machine is up again, its interpreter's start included: {taken:.2f} s\n")
        assert server.stop() == 0
        # it stays for the next start, until one does not want to keep it
        assert "siderolink" in net.server.interfaces()
        net.server.run(["ip", "link", "del", "siderolink"])
