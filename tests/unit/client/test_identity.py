import json
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from siderolink.client.link.identity import UniqueTokens, machine_uuid
from siderolink.common.errors import ConfigurationError, HostError
from siderolink.common.node_uuid import PLACEHOLDERS

MACHINE_ID = "0123456789abcdef0123456789abcdef"


def uuid_from(tmp_path: Path, smbios: str | None, machine_id: str | None) -> str:
    files = []
    for name, text in (("smbios", smbios), ("machine-id", machine_id)):
        path = tmp_path / name
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        files.append(path)
    return machine_uuid(*files)


def test_the_firmwares_uuid_in_lower_case(tmp_path: Path) -> None:
    assert uuid_from(tmp_path, "4C4C4544-004A-3510-8052-B4C04F4A3132\n", MACHINE_ID) == "4c4c4544-004a-3510-8052-b4c04f4a3132"


def test_a_placeholder_or_malformed_uuid_counts_as_none(tmp_path: Path) -> None:
    stable = uuid_from(tmp_path, None, MACHINE_ID)
    for smbios in (*PLACEHOLDERS, "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", "Not Specified", "\xff"):
        assert uuid_from(tmp_path, smbios, MACHINE_ID) == stable


def test_the_machine_id_gives_a_stable_uuid_and_is_not_sent(tmp_path: Path) -> None:
    found = uuid_from(tmp_path, None, MACHINE_ID)
    assert found == uuid_from(tmp_path, None, MACHINE_ID + "\n")
    assert found != uuid_from(tmp_path, None, MACHINE_ID[::-1])
    assert UUID(found).hex != MACHINE_ID


def test_without_any_source_the_uuid_is_random(tmp_path: Path) -> None:
    assert UUID(uuid_from(tmp_path, None, None)) != UUID(uuid_from(tmp_path, None, "too short"))


def test_a_folder_in_the_place_of_the_machine_id_counts_as_none(tmp_path: Path) -> None:
    """A container engine makes one if it shall mount a file that the host lacks."""
    folder = tmp_path / "machine-id"
    folder.mkdir()
    assert UUID(machine_uuid(tmp_path / "nothing", folder)).version == 4


def test_what_is_drawn_at_random_is_drawn_once_and_kept(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    first = machine_uuid(nothing, nothing, tmp_path / "state")
    assert machine_uuid(nothing, nothing, tmp_path / "state") == first
    (tmp_path / "state" / "machine-uuid").write_text("")  # truncated by a crash
    again = machine_uuid(nothing, nothing, tmp_path / "state")
    assert again != first
    assert machine_uuid(nothing, nothing, tmp_path / "state") == again


@pytest.mark.anyio
async def test_each_server_knows_the_machine_by_a_token_of_its_own_which_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    tokens = UniqueTokens(folder)
    one = await tokens.token(("server", 443), "a-uuid")
    assert re.fullmatch(r'\{"Fingerprint":"[0-9a-f]{64}","Token":"[0-9a-f-]{36}"\}', one)
    assert UUID(json.loads(one)["Token"]).version == 4
    others = [await tokens.token(key, name) for key, name in ((("server", 444), "a-uuid"), (("server", 443), "b-uuid"))]
    assert len({json.loads(token)["Token"] for token in (one, *others)}) == 3
    assert await UniqueTokens(folder).token(("server", 443), "a-uuid") == one, "another start is the same machine"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    assert len(list(folder.iterdir())) == 3, "nothing temporary is left"


@pytest.mark.anyio
async def test_a_token_that_cannot_be_stored_lasts_for_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    tokens = UniqueTokens(blocked / "state")
    token = await tokens.token(("server", 443), "a-uuid")
    assert await tokens.token(("server", 443), "a-uuid") == token
    assert json.loads(token)["Token"] not in caplog.text
    assert "state" in caplog.text


@pytest.mark.anyio
async def test_two_processes_share_a_token(tmp_path: Path) -> None:
    first, second = UniqueTokens(tmp_path), UniqueTokens(tmp_path)
    assert await first.token(("server", 443), "a-uuid") == await second.token(("server", 443), "a-uuid")


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.anyio
async def test_a_token_that_cannot_be_read_at_the_moment_is_not_replaced(tmp_path: Path) -> None:
    kept = await UniqueTokens(tmp_path).token(("server", 443), "a-uuid")
    tokens = UniqueTokens(tmp_path)
    with no_descriptors(), pytest.raises(HostError, match="cannot be read: this process has too many files open"):
        await tokens.token(("server", 443), "a-uuid")
    assert await tokens.token(("server", 443), "a-uuid") == kept
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.anyio
async def test_a_damaged_token_is_told_and_left(tmp_path: Path) -> None:
    await UniqueTokens(tmp_path).token(("server", 443), "a-uuid")
    file = tmp_path / os.listdir(tmp_path)[0]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="is damaged; restore it, or remove it"):
        await UniqueTokens(tmp_path).token(("server", 443), "a-uuid")
    assert file.read_bytes() == b"\xff\xfe"


def test_a_uuid_that_cannot_be_read_at_the_moment_is_not_replaced_by_another(tmp_path: Path) -> None:
    smbios, machine_id, nothing = tmp_path / "smbios", tmp_path / "machine-id", tmp_path / "nothing"
    smbios.write_text("4c4c4544-004a-3510-8052-b4c04f4a3132\n")
    machine_id.write_text(MACHINE_ID)
    stored = machine_uuid(nothing, nothing, tmp_path / "state")
    for sources in ((smbios, machine_id, None), (nothing, machine_id, None), (nothing, nothing, tmp_path / "state")):
        with no_descriptors(), pytest.raises(HostError, match="too many files open"):
            machine_uuid(*sources)
    assert machine_uuid(nothing, nothing, tmp_path / "state") == stored


def test_join_waits_for_its_token(tmp_path: Path) -> None:
    """What stands in the file's place cannot be read; the server is never told another token."""
    node_uuid = "4c4c4544-004a-3510-8052-b4c04f4a3132"
    folder, code = tmp_path / "identity", "import anyio, sys; from siderolink.client.link.identity import UniqueTokens as U; "
    code += "from pathlib import Path; anyio.run(U(Path(sys.argv[1])).token, ('127.0.0.1', 1), sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, str(folder), node_uuid], check=True, timeout=60)
    (file,) = folder.iterdir()
    token = file.read_text()
    file.unlink()
    file.mkdir()
    command = ["join", "grpc://127.0.0.1:1?jointoken=x", "--uuid", node_uuid, "--identity", str(folder)]
    environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(tmp_path / "run")}
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "siderolink", *command], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            told = next(line for line in process.stdout if "again in" in line)
            assert f"{file} cannot be read: Is a directory" in told
            file.rmdir()
            file.write_text(token)
            assert any("provision failed" in line for line in process.stdout)
            assert file.read_text() == token
        finally:
            process.terminate()
