"""h2's engine of one connection, made ready for our limits. What is the same for every connection is made once."""

from functools import lru_cache

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection
from h2.settings import SettingCodes, Settings

from siderolink.common.grpc import frames
from siderolink.common.grpc.header_fields import FieldDecoder
from siderolink.common.grpc.limits import DEFAULT_WINDOW, Limits

_STREAM_HEADROOM = 4


@lru_cache(maxsize=2)
def h2_config(*, server: bool) -> H2Configuration:
    return H2Configuration(
        client_side=not server,
        header_encoding="latin-1",  # ASCII on the wire; a byte above it must not raise half way through a frame
        validate_inbound_headers=not server,  # a server checks a request's fields itself: header_fields.check_fields
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        normalize_inbound_headers=False,
    )


def new_h2_connection(limits: Limits, *, server: bool) -> H2Connection:
    """An engine that has its first words ready to send."""
    connection = H2Connection(h2_config(server=server))
    # The engine ends a whole connection for one call too many. It is told a higher number than the peer, so that
    # calls opened before the peer has read our settings are refused one by one.
    settings = _settings(limits, server=server)
    if server:
        settings[SettingCodes.MAX_CONCURRENT_STREAMS] *= _STREAM_HEADROOM
    connection.local_settings = Settings(client=not server, initial_values=settings)
    connection.max_inbound_frame_size = limits.max_frame_bytes
    connection.decoder = FieldDecoder(limits.max_header_bytes)
    connection.state_machine.process_input(ConnectionInputs.SEND_SETTINGS)
    connection._inbound_flow_control_window_manager.window_opened(limits.connection_window_bytes - DEFAULT_WINDOW)
    connection._data_to_send += _first_words(limits, server=server)
    return connection


def _settings(limits: Limits, *, server: bool) -> dict[SettingCodes, int]:
    return {
        SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
        SettingCodes.MAX_FRAME_SIZE: limits.max_frame_bytes,
        SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
        (SettingCodes.MAX_CONCURRENT_STREAMS if server else SettingCodes.ENABLE_PUSH): limits.max_streams if server else 0,
    }


@lru_cache(maxsize=8)
def _first_words(limits: Limits, *, server: bool) -> bytes:
    """What either side says first (RFC 9113, 3.4), and how much more the peer may send than it knows."""
    connection = H2Connection(h2_config(server=server))
    connection.local_settings = Settings(client=not server, initial_values=_settings(limits, server=server))
    connection.initiate_connection()
    more = limits.connection_window_bytes - DEFAULT_WINDOW
    return bytes(connection.data_to_send()) + (frames.window_update(0, more) if more else b"")
