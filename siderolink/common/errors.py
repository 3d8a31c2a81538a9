"""Every exception the package raises, in one tree. Messages say what was wrong and what to do; never a secret."""


class SideroLinkError(Exception):
    """The base of all errors raised on purpose by this package."""


class ConfigurationError(SideroLinkError, ValueError):
    """Raised when an option, URL or document cannot be used as given."""


class JoinURLError(ConfigurationError):
    """Raised when a join URL cannot be parsed."""


class KeyFormatError(ConfigurationError):
    """Raised when a WireGuard key is not 32 bytes of standard base64."""


class DeviceError(SideroLinkError):
    """Raised when a WireGuard interface cannot be created or was deleted."""


class DeviceUnavailableError(DeviceError):
    """Raised when this host lacks what a device needs: /dev/net/tun, the kernel module, or the right to use them."""


class InterfaceInUseError(DeviceError):
    """Raised when an interface of that name already exists."""


class OverlayInUseError(DeviceError):
    """Raised when another interface of this host already has an address in the overlay, which would be the same one."""


class AddressInUseError(SideroLinkError):
    """Raised when a UDP or TCP port to listen on is in use."""


class JoinError(SideroLinkError):
    """The base of errors between a machine and its server's API."""


class ServerUnreachableError(JoinError):
    """Raised when the server's API cannot be reached or does not answer in time. A later retry may succeed."""


class JoinRefusedError(JoinError):
    """Raised when the server refuses a join; `status` is the gRPC status name."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"the server refused the join: {status}: {message}")
        self.status = status
        self.message = message


class InvalidAnswerError(JoinError):
    """Raised when the server's answer to a join breaks the protocol."""


class HandshakeTimeoutError(JoinError):
    """Raised when no WireGuard handshake completes in the time allowed."""


class StoreError(SideroLinkError):
    """Raised when the server's record of its machines cannot be read or written."""


class StoreUnavailableError(StoreError):
    """Raised when the database does not answer. The operation may be repeated; it may also have succeeded."""


class StoreFullError(StoreError):
    """Raised when the store cannot grow because the disk is full. Nothing was changed."""


class NotFoundError(SideroLinkError):
    """Raised when an object that an administrator names does not exist."""


class AlreadyExistsError(SideroLinkError):
    """Raised when another object already has the name."""


class ForbiddenError(SideroLinkError):
    """Raised when the caller's role does not include the operation."""


class UnauthenticatedError(SideroLinkError):
    """Raised when a caller of the admin API presents no valid credentials."""
