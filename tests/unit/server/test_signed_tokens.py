"""Signed join tokens to the byte: the decoding by Go's encoding/json, and the bytes that are signed."""

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.server.admission.signed_tokens import PROVIDER, SignedToken, parse, sign
from siderolink.server.admission.tokens import JoinTokenCheck, JoinTokenState

KEY = "the-join-token"
VECTORS = json.loads(Path(__file__).with_name("signed_tokens.json").read_text())
"""Made by a Go program (go1.26): `document` is decoded into a struct of `extra_data map[string]string` and `signature []byte`;
`signed` is that map encoded again, `mac` its HMAC-SHA256 under KEY; both are null for a document that is refused. Base64."""


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: base64.b64decode(vector["document"]).decode(errors="replace"))
def test_documents_and_signatures_match_those_of_other_signers(vector: dict[str, str | None]) -> None:
    token = f"v1:{vector['document']}"
    if vector["signed"] is None:
        with pytest.raises(ValueError, match="JSON|base64|text"):
            parse(token)
        assert JoinTokenCheck(KEY).check(token).state is JoinTokenState.MALFORMED
        return
    assert vector["mac"] is not None
    read = parse(token)
    assert not read.is_signed_by(KEY)
    assert SignedToken(read.version, read.extra, base64.b64decode(vector["mac"])).is_signed_by(KEY)


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


@given(st.none() | st.dictionaries(TEXT, TEXT, max_size=4), st.sampled_from(["v1", "v2"]))
def test_tokens_signed_here_are_accepted_here(extra: dict[str, str] | None, version: str) -> None:
    token = sign(version, KEY, extra)
    read = parse(token)
    assert (read.version, read.extra) == (version, extra)
    assert read.is_signed_by(KEY)
    assert not read.is_signed_by(KEY + "x")
    assert JoinTokenCheck(KEY).check(token).is_valid == (version == "v1" or extra is None or PROVIDER not in extra)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_document_is_read_or_refused_with_one_error(document: bytes) -> None:
    for text in (base64.b64encode(document).decode(), document.decode(errors="replace")):
        assert JoinTokenCheck(KEY).check(f"v2:{text}").state in (JoinTokenState.WRONG, JoinTokenState.MALFORMED)
