"""The syntax of patterns: from text to a tree. No matching here."""

import string
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NoReturn

LONGEST_PATTERN = 256
DEEPEST = 32
_MOST_REPEATS = 1000
_LAST = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]
"""First and last code points, in order, that do not touch."""


class PatternError(ValueError):
    """Raised when a pattern is malformed, too long, or uses what is not served."""


@dataclass(frozen=True, slots=True)
class CharacterSet:
    """Takes one character of these."""

    ranges: Ranges

    def holds(self, character: str) -> bool:
        code = ord(character)
        index = bisect_right(self.ranges, (code, _LAST)) - 1
        return index >= 0 and code <= self.ranges[index][1]


@dataclass(frozen=True, slots=True)
class Begin:
    """The beginning of the text."""


@dataclass(frozen=True, slots=True)
class End:
    """The end of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One of: a single step, a sequence, alternatives, a repetition."""

    single: CharacterSet | Begin | End | None = None
    sequence: "list[Node] | None" = None
    alternatives: "list[Node] | None" = None
    repeated: "Node | None" = field(default=None)
    least: int = 1
    most: int | None = 1


def parse(text: str) -> Node:
    """The tree. Raises PatternError."""
    if len(text) > LONGEST_PATTERN:
        raise PatternError(f"a pattern has at most {LONGEST_PATTERN} characters")
    return _Parser(text).parse()


def _joined(ranges: list[tuple[int, int]]) -> Ranges:
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple(joined)


def _all_but(ranges: Ranges) -> Ranges:
    found, begin = [], 0
    for first, last in ranges:
        if begin < first:
            found.append((begin, first - 1))
        begin = last + 1
    return tuple([*found, (begin, _LAST)] if begin <= _LAST else found)


def _of(characters: str) -> Ranges:
    return _joined([(ord(character), ord(character)) for character in characters])


_KINDS = {"d": _of(string.digits), "w": _of(string.ascii_letters + string.digits + "_"), "s": _of("\t\n\f\r ")}
_KINDS |= {letter.upper(): _all_but(ranges) for letter, ranges in _KINDS.items()}
_CONTROLS = {"a": "\a", "f": "\f", "t": "\t", "n": "\n", "r": "\r", "v": "\v"}


class _Parser:
    """Never deeper than DEEPEST groups, so it may call itself."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._any = _all_but(_of("\n"))
        self._ignores_case = False

    def parse(self) -> Node:
        flags = self._flags()
        self._ignores_case = "i" in flags
        if "s" in flags:
            self._any = ((0, _LAST),)
        root = self._alternatives(0)
        if self._at < len(self._text):
            self._refuse("a parenthesis that nothing opened")
        return root

    def _flags(self) -> str:
        end = self._text.find(")")
        flags = self._text[2:end] if self._text.startswith("(?") else ""
        if not flags or set(flags) - set("is"):
            return ""
        self._at = end + 1
        return flags

    def _refuse(self, what: str) -> NoReturn:
        raise PatternError(f"{what}, at character {self._at + 1} of the pattern")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        if self._at >= len(self._text):
            self._refuse("the pattern ends too soon")
        self._at += 1
        return self._text[self._at - 1]

    def _alternatives(self, depth: int) -> Node:
        found = [self._sequence(depth)]
        while self._peek() == "|":
            self._take()
            found.append(self._sequence(depth))
        return found[0] if len(found) == 1 else Node(alternatives=found)

    def _sequence(self, depth: int) -> Node:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom(depth)))
        return Node(sequence=parts)

    def _repeated(self, atom: Node) -> Node:
        while True:
            least, most = self._count()
            if least is None:
                return atom
            if self._peek() == "?":  # as few as possible: the same texts match
                self._take()
            atom = Node(repeated=atom, least=least, most=most)

    def _count(self) -> tuple[int | None, int | None]:
        counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        character = self._peek()
        if character in counts:
            self._take()
            return counts[character]
        end = self._text.find("}", self._at)
        least, comma, most = self._text[self._at + 1 : end].partition(",")
        digits = set(string.digits)
        if character != "{" or end < 0 or not least or set(least + most) - digits:
            return None, None  # a brace that counts nothing is a character
        self._at = end + 1
        low, high = int(least), int(most) if most else None if comma else int(least)
        if low > _MOST_REPEATS or (high is not None and not low <= high <= _MOST_REPEATS):
            self._refuse("a count that cannot be")
        return low, high

    def _atom(self, depth: int) -> Node:
        character = self._take()
        if character == "(":
            return self._group(depth)
        if character == "[":
            return Node(single=CharacterSet(self._class()))
        if character in ("^", "$"):
            return Node(single=Begin() if character == "^" else End())
        if character == ".":
            return Node(single=CharacterSet(self._any))
        if character in "*+?":
            self._refuse("nothing stands before what repeats it")
        if character != "\\":
            return Node(single=CharacterSet(self._either_case(_of(character))))
        if self._peek() in ("A", "z"):
            return Node(single=Begin() if self._take() == "A" else End())
        return Node(single=CharacterSet(self._either_case(self._escape())))

    def _either_case(self, ranges: Ranges) -> Ranges:
        """With the other case of Latin letters, where case does not matter."""
        if not self._ignores_case:
            return ranges
        letters = [letter for letter in string.ascii_letters if CharacterSet(ranges).holds(letter)]
        return _joined([*ranges, *_of("".join(letters).swapcase())])

    def _group(self, depth: int) -> Node:
        if depth >= DEEPEST:
            self._refuse(f"more than {DEEPEST} groups within each other")
        if self._peek() == "?":
            self._take()
            self._group_name()
        found = self._alternatives(depth + 1)
        if self._peek() != ")":
            self._refuse("a group that does not end")
        self._take()
        return found

    def _group_name(self) -> None:
        """Names do not matter, but for their form."""
        kind = self._take()
        if kind == ":":
            return
        if kind == "P":
            kind = self._take()
        end = self._text.find(">", self._at)
        if kind != "<" or end <= self._at or not self._text[self._at : end].isidentifier():
            self._refuse("groups of this kind are not served")
        self._at = end + 1

    def _escape(self) -> Ranges:
        character = self._take()
        if character in _KINDS:
            return _KINDS[character]
        if character in _CONTROLS:
            return _of(_CONTROLS[character])
        if character == "x":
            return self._by_number()
        if not character.isascii() or character.isalnum():
            self._refuse(f"the escape \\{character} is not served")
        return _of(character)

    def _by_number(self) -> Ranges:
        digits = self._take()
        if digits == "{":
            end = self._text.find("}", self._at)
            digits, self._at = self._text[self._at : end], end + 1
        else:
            digits += self._take()
        if not 0 < len(digits) <= 6 or set(digits) - set(string.hexdigits) or int(digits, 16) > _LAST:
            self._refuse("a number that is no character's")
        return ((int(digits, 16), int(digits, 16)),)

    def _class(self) -> Ranges:
        opposite = self._peek() == "^"
        if opposite:
            self._take()
        found: list[tuple[int, int]] = []
        is_first = True
        while is_first or self._peek() != "]":
            is_first = False
            low = self._member()
            if self._peek() != "-" or self._text[self._at + 1 : self._at + 2] in ("", "]"):
                found.extend(low)
                continue
            self._take()
            high = self._member()
            if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1] or low > high:
                self._refuse("a range that cannot be")
            found.append((low[0][0], high[0][0]))
        self._take()
        ranges = self._either_case(_joined(found))
        return _all_but(ranges) if opposite else ranges

    def _member(self) -> Ranges:
        character = self._take()
        if character == "[" and self._peek() == ":":
            self._refuse("named classes are not served")
        return self._escape() if character == "\\" else _of(character)
