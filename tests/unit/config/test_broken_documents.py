"""Broken documents, one a file, by every way in which a machine can be given them."""

import re
import subprocess
import sys
import time
from pathlib import Path

import anyio.to_thread
import grpc
import pytest

from siderolink.client.config.documents import load_documents, parse_documents
from siderolink.client.maintenance import ApplyAnswer, ApplyRequest, MachineHooks, serve_maintenance
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.machine import ApplyConfigurationRequest, ApplyConfigurationRequestMode, ApplyConfigurationResponse
from tests.support.machine_api import MACHINE, MachineClient, machine_client, status_of

BROKEN = sorted((Path(__file__).parent / "broken").glob("*.yaml"))
SECRET = "hunter2"


@pytest.mark.parametrize("file", BROKEN, ids=lambda file: file.stem)
def test_a_broken_document_is_one_line_that_names_the_place(file: Path) -> None:
    started = time.process_time()
    with pytest.raises(ConfigurationError) as caught:
        parse_documents([(file.read_bytes(), str(file))])
    problems = load_documents(file).settings.problems
    assert time.process_time() - started < 5
    assert problems
    for said in (str(caught.value), *problems):
        assert re.match(rf"{re.escape(str(file))}:[0-9]+: ", said), said
        assert "\n" not in said
        assert len(said) < 1000
        assert SECRET not in said


def is_text(file: Path) -> bool:
    try:
        file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return True


# a file that is not text, or has too many documents, is ignored completely
STREAMS = [file for file in BROKEN if is_text(file) and file.stem != "too-many-documents"]


@pytest.mark.parametrize("file", STREAMS, ids=lambda file: file.stem)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_broken_document_does_not_affect_others_in_its_stream(file: Path, is_first: bool, tmp_path: Path) -> None:
    good = b"apiVersion: v1alpha1\nkind: KmsgLogConfig\nname: kept\nurl: tcp://kept.example:1\n"
    broken = file.read_bytes()
    stream = tmp_path / "stream.yaml"
    stream.write_bytes(b"\n---\n".join((good, broken) if is_first else (broken, good)))
    settings = load_documents(stream).settings
    assert "tcp://kept.example:1" in [str(log.value) for log in settings.kernel_logs]
    assert settings.problems


def test_the_command_reports_a_broken_document_of_a_folder_and_shows_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: https://siderolink.example\n")
    (tmp_path / "b.yaml").write_bytes(BROKEN[0].read_bytes())
    command = [sys.executable, "-m", "siderolink", "config", "show", "--config", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert all(line.startswith(f"problem: {tmp_path / 'b.yaml'}:") for line in done.stderr.splitlines())
    assert done.stdout == f"join URL         https://siderolink.example:443  ({tmp_path / 'a.yaml'}:1 SideroLinkConfig)\n"
    assert f"{tmp_path / 'b.yaml'}:" in done.stderr


def refused(client: MachineClient, data: bytes) -> tuple[str, str]:
    request = ApplyConfigurationRequest(data=data, mode=ApplyConfigurationRequestMode.AUTO)
    with pytest.raises(grpc.RpcError) as caught:
        client.call(f"{MACHINE}ApplyConfiguration", request, ApplyConfigurationResponse)
    return status_of(caught.value)


@pytest.mark.anyio
async def test_the_api_refuses_each_broken_document() -> None:
    async def hook(request: ApplyRequest) -> ApplyAnswer:
        parse_documents([(request.data, "the configuration")])
        return ApplyAnswer()

    def apply_all(port: int) -> list[tuple[str, str]]:
        with machine_client("127.0.0.1", port) as client:
            found = [refused(client, file.read_bytes()) for file in BROKEN]
            assert client.version().messages
            return found

    async with serve_maintenance(MachineHooks(apply_configuration=hook), node_uuid="", port=0) as api:
        assert api.port is not None
        for status, said in await anyio.to_thread.run_sync(apply_all, api.port):
            assert status == "INVALID_ARGUMENT"
            assert said.startswith("the configuration:")
            assert SECRET not in said
