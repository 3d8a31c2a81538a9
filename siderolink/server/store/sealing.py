"""Secrets at rest, sealed with a key that is stored separately, so that a copy of the state alone reveals none.

Sealed are the server's private key, join tokens, and the unique tokens that the server gave to machines. A sealed value is
MAGIC, the key's id (8 bytes), a nonce (12) and the output of ChaCha20-Poly1305 (RFC 8439). The associated data names table, row
and column, so that a value moved elsewhere does not open. Values without MAGIC are unsealed (older state, or no key).
"""

import base64
import binascii
import os
from hashlib import blake2b
from pathlib import Path
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from siderolink.common.errors import StoreError
from siderolink.common.private_files import create_private

KEY_BYTES: Final = 32
MAGIC: Final = b"\0sl1\0"
_ID_BYTES, _NONCE_BYTES, _TAG_BYTES = 8, 12, 16
_HEADER_BYTES = len(MAGIC) + _ID_BYTES + _NONCE_BYTES
_TEXT = "sealed:"

Place = tuple[str, str, str]
"""Table, row and column of a value."""


class SealError(StoreError):
    """Raised when a sealed secret cannot be opened: the state's key is missing or wrong, or the value is damaged."""


class StateKey(Protocol):
    """The source of the key. Both methods raise StoreError."""

    @property
    def where(self) -> str:
        """A description for humans, such as "/var/lib/siderolink/state.key"."""

    def read(self, key_id: bytes | None = None) -> bytes | None:
        """The key; None if there is none. If there are several, the one with this id."""

    def make(self) -> bytes | None:
        """The key for a state that has sealed nothing yet, created if necessary; None leaves secrets unsealed."""


class GivenKey:
    """A fixed key, or none."""

    def __init__(self, key: bytes | None, where: str = "the key that was given") -> None:
        if key is not None and len(key) != KEY_BYTES:
            raise StoreError(f"a state key has {KEY_BYTES} bytes, not {len(key)}")
        self._key = key
        self.where = where

    def read(self, key_id: bytes | None = None) -> bytes | None:
        return self._key

    make = read


class KeyFile:
    """A file with one line, the key in base64; created when it is first needed.

    During a change of keys, the new one is in a second file next to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.new_path = path.with_name(f"{path.name}.new")
        self.where = str(path)

    def read(self, key_id: bytes | None = None) -> bytes | None:
        key = read_key(self.path)
        if key_id is not None and (key is None or id_of(key) != key_id):
            new = read_key(self.new_path)
            if new is not None and id_of(new) == key_id:  # the change of keys was interrupted after its commit
                os.replace(self.new_path, self.path)
                return new
        return key

    def make(self) -> bytes:
        key = read_key(self.path)
        if key is None:
            key = os.urandom(KEY_BYTES)
            write_key(self.path, key)
        return key


def key_file_beside(state: Path) -> Path:
    """The default path of a state file's key."""
    return state.with_name(f"{state.name}.key")


def read_key(path: Path) -> bytes | None:
    """None if there is no such file. Raises StoreError if it contains no valid key."""
    try:
        with path.open("rb") as opened:
            return parse_key(opened.read(1024).decode("ascii", "replace"), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"cannot read the state key {path}: {error.strerror}") from None


def parse_key(text: str, where: str) -> bytes:
    """Parse a key's text form. Raises StoreError, whose message does not contain the text."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise StoreError(f"{where} holds no state key: that is one line with {KEY_BYTES} bytes in base64")
    return key


def write_key(path: Path, key: bytes) -> None:
    """Write a new file that only its owner can read. Raises StoreError, also if it exists."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_private(path, base64.b64encode(key) + b"\n")
    except OSError as error:
        raise StoreError(f"cannot write the state key {path}: {error.strerror}") from None


def id_of(key: bytes) -> bytes:
    """The key's id in sealed values; reveals nothing about the key."""
    return blake2b(key, digest_size=_ID_BYTES, person=b"siderolink key").digest()


def is_sealed(value: bytes | str) -> bool:
    return value.startswith(_TEXT) if isinstance(value, str) else value.startswith(MAGIC)


class Sealer:
    """Seals and opens the secrets of one state."""

    def __init__(self, key: StateKey) -> None:
        self._source = key
        self._ciphers: dict[bytes, ChaCha20Poly1305] = {}
        self._current: bytes | None = None

    def seal(self, secret: bytes, place: Place) -> bytes:
        """The sealed secret; the secret itself if there is no key and none is created. Raises StoreError."""
        if self._current is None:
            key = self._source.make()
            if key is None:
                return secret
            self._current = self._add(key)
        nonce = os.urandom(_NONCE_BYTES)
        return MAGIC + self._current + nonce + self._ciphers[self._current].encrypt(nonce, secret, _name(place))

    def open(self, value: bytes, place: Place) -> bytes:
        """Raises SealError."""
        if not is_sealed(value):
            return value
        if len(value) < _HEADER_BYTES + _TAG_BYTES:
            raise SealError(_damaged(place))
        key_id, nonce = value[len(MAGIC) : len(MAGIC) + _ID_BYTES], value[len(MAGIC) + _ID_BYTES : _HEADER_BYTES]
        if key_id not in self._ciphers:
            self._find(key_id)
        try:
            return self._ciphers[key_id].decrypt(nonce, value[_HEADER_BYTES:], _name(place))
        except InvalidTag:
            raise SealError(_damaged(place)) from None

    def seal_text(self, secret: str, place: Place) -> str:
        """Like `seal`, for a text column."""
        sealed = self.seal(secret.encode(), place)
        return _TEXT + base64.b64encode(sealed).decode() if is_sealed(sealed) else secret

    def open_text(self, value: str, place: Place) -> str:
        """Raises SealError."""
        if not is_sealed(value):
            return value
        try:
            return self.open(base64.b64decode(value.removeprefix(_TEXT), validate=True), place).decode()
        except ValueError:
            raise SealError(_damaged(place)) from None

    def _find(self, key_id: bytes) -> None:
        key = self._source.read(key_id)
        if key is None:
            raise SealError(
                f"the secrets of the state are sealed with the key {key_id.hex()}, and there is no key: {self._source.where}; "
                "put the key of this state there, or restore a backup whose key you have"
            )
        if self._add(key) != key_id:
            raise SealError(
                f"the secrets of the state are sealed with the key {key_id.hex()}, and {self._source.where} is the key "
                f"{id_of(key).hex()}; give the key of this state, or restore a backup that belongs to that key"
            )
        self._current = key_id

    def _add(self, key: bytes) -> bytes:
        key_id = id_of(key)
        self._ciphers[key_id] = ChaCha20Poly1305(key)
        return key_id


def _name(place: Place) -> bytes:
    return b"\0".join(part.encode() for part in place)


def _damaged(place: Place) -> str:
    table, _, column = place
    return f"a secret of the state ({table}.{column}) is damaged, or was moved from another row"


# --- locations of secrets

SERVER_KEY: Final[Place] = ("server", "1", "private_key")


def place_of_token(token_id: str) -> Place:
    """The place of a join token's text."""
    return "join_tokens", token_id, "secret"


def place_of_assigned(machine_id: str) -> Place:
    """The place of the unique token that the server gave to a machine."""
    return "machines", machine_id, "assigned_token"
