"""Lines out of a stream of bytes that comes in any pieces. No I/O."""


class LineSplitter:
    """Cuts at newlines. A line above the cap is skipped to its end, without being kept meanwhile, and counted."""

    def __init__(self, max_bytes: int) -> None:
        self.too_long = 0
        """How many lines were skipped."""
        self._max_bytes = max_bytes
        self._partial = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now, without their ends; empty ones are left out."""
        lines: list[bytes] = []
        *ended, rest = data.split(b"\n")
        for piece in ended:
            self._take(piece)
            if not self._skipping and (line := bytes(self._partial).rstrip(b"\r")):
                lines.append(line)
            self._partial.clear()
            self._skipping = False
        self._take(rest)
        return lines

    def rest(self) -> bytes:
        """What has come of a line whose end has not."""
        return bytes(self._partial)

    def _take(self, piece: bytes) -> None:
        if self._skipping:
            return
        if len(self._partial) + len(piece) > self._max_bytes:
            self.too_long += 1
            self._skipping = True
            self._partial.clear()
        else:
            self._partial += piece
