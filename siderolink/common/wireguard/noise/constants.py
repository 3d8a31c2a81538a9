"""The protocol's own numbers (WireGuard whitepaper, sections 5 and 6). What we choose ourselves stands beside its use."""

CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"
LABEL_MAC1 = b"mac1----"
LABEL_COOKIE = b"cookie--"

KEY_BYTES = 32
HASH_BYTES = 32
TAG_BYTES = 16
MAC_BYTES = 16
TIMESTAMP_BYTES = 12

# Section 6.1; times are seconds.
REKEY_AFTER_MESSAGES = 2**60
REJECT_AFTER_MESSAGES = 2**64 - 2**13 - 1
REKEY_AFTER_TIME = 120.0
REJECT_AFTER_TIME = 180.0
REKEY_ATTEMPT_TIME = 90.0
REKEY_TIMEOUT = 5.0
KEEPALIVE_TIMEOUT = 10.0
COOKIE_REFRESH_TIME = 120.0

# Derived there in words.
REKEY_ON_RECEIVE_TIME = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT
NEW_HANDSHAKE_TIME = KEEPALIVE_TIMEOUT + REKEY_TIMEOUT
ZERO_KEYS_TIME = REJECT_AFTER_TIME * 3
REKEY_JITTER = 1 / 3
"""At most this is added to a retry, so that two ends that start together do not stay in step."""

PADDING_MULTIPLE = 16
COUNTER_WINDOW = 8128
"""How far behind the newest counter a datagram may still be accepted."""
