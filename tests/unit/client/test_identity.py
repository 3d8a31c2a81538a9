from pathlib import Path
from uuid import UUID

from siderolink.client.link.identity import machine_uuid

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


def test_a_placeholder_or_nonsense_counts_as_none(tmp_path: Path) -> None:
    stable = uuid_from(tmp_path, None, MACHINE_ID)
    for smbios in ("00000000-0000-0000-0000-000000000000", "03000200-0400-0500-0006-000700080009", "Not Specified", "\xff"):
        assert uuid_from(tmp_path, smbios, MACHINE_ID) == stable


def test_the_machine_id_gives_a_stable_uuid_and_is_not_told(tmp_path: Path) -> None:
    found = uuid_from(tmp_path, None, MACHINE_ID)
    assert found == uuid_from(tmp_path, None, MACHINE_ID + "\n")
    assert found != uuid_from(tmp_path, None, MACHINE_ID[::-1])
    assert UUID(found).hex != MACHINE_ID


def test_a_random_one_where_there_is_nothing(tmp_path: Path) -> None:
    assert UUID(uuid_from(tmp_path, None, None)) != UUID(uuid_from(tmp_path, None, "too short"))
