"""Patterns that a stranger sends, matched in steps whose number is bounded by the pattern and the text, whatever both are.

The syntax is that of RE2, which clients of the resource API write, as far as it is of use for ids: characters, ``.``, classes,
groups, ``|``, ``* + ? {n,m}``, ``^ $ \\A \\z``, the escapes ``\\d \\w \\s`` and their opposites, and the flags ``(?i)`` (for
Latin letters) and ``(?s)`` at the beginning. A pattern becomes a program; all of its branches are followed at the same time, so
that none is ever taken back.
"""

from dataclasses import dataclass

from siderolink.client.maintenance.pattern_syntax import Begin, CharacterSet, End, Node, PatternError, parse

LONGEST_PROGRAM = 256
_MOST_WORK = 4 * LONGEST_PROGRAM
_MOST_KEPT = 1024


@dataclass(frozen=True, slots=True)
class _Jump:
    """Go on at every one of these."""

    targets: list[int]


_Instruction = CharacterSet | Begin | End | _Jump


class Pattern:
    """A pattern that may occur anywhere in a text."""

    def __init__(self, text: str) -> None:
        """Raises PatternError for what is malformed, too long, or not of the syntax above."""
        self._program: list[_Instruction] = []
        self._work = 0
        self._emit(parse(text))
        self._end = len(self._program)
        self._steps: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}

    def matches(self, text: str) -> bool:
        """Whether the pattern occurs in the text."""
        states = self._closure([0], at_begin=True, at_end=not text)
        for index, character in enumerate(text, 1):
            if self._end in states:
                return True
            states = self._step(states, character, index == len(text))
        return self._end in states

    def _step(self, states: frozenset[int], character: str, at_end: bool) -> frozenset[int]:
        known = self._steps.get((states, character, at_end))
        if known is not None:
            return known
        moved = [0]  # the pattern may begin anywhere
        for state in states:
            instruction = self._program[state] if state < self._end else None
            if isinstance(instruction, CharacterSet) and instruction.holds(character):
                moved.append(state + 1)
        found = self._closure(moved, at_begin=False, at_end=at_end)
        if len(self._steps) >= _MOST_KEPT:
            self._steps.clear()
        self._steps[states, character, at_end] = found
        return found

    def _closure(self, begin: list[int], *, at_begin: bool, at_end: bool) -> frozenset[int]:
        """All that is reached without taking a character."""
        found, waiting = set(begin), list(begin)
        while waiting:
            state = waiting.pop()
            instruction = self._program[state] if state < self._end else None
            reached: list[int] = []
            if isinstance(instruction, _Jump):
                reached = instruction.targets
            elif (isinstance(instruction, Begin) and at_begin) or (isinstance(instruction, End) and at_end):
                reached = [state + 1]
            for target in reached:
                if target not in found:
                    found.add(target)
                    waiting.append(target)
        return frozenset(found)

    # from syntax to program

    def _emit(self, node: Node) -> None:
        self._work += 1
        if len(self._program) > LONGEST_PROGRAM or self._work > _MOST_WORK:
            raise PatternError("the pattern stands for more than is matched here")
        if node.alternatives is not None:
            self._emit_alternatives(node.alternatives)
        elif node.repeated is not None:
            self._emit_repeated(node.repeated, node.least, node.most)
        elif node.sequence is not None:
            for part in node.sequence:
                self._emit(part)
        elif node.single is not None:
            self._program.append(node.single)

    def _emit_alternatives(self, alternatives: list[Node]) -> None:
        choice, ends = _Jump([]), _Jump([])
        self._program.append(choice)
        for node in alternatives:
            choice.targets.append(len(self._program))
            self._emit(node)
            self._program.append(ends)
        ends.targets.append(len(self._program))

    def _emit_repeated(self, node: Node, least: int, most: int | None) -> None:
        for _ in range(least):
            self._emit(node)
        if most is None:
            loop = _Jump([])
            start = len(self._program)
            self._program.append(loop)
            self._emit(node)
            self._program.append(_Jump([start]))
            loop.targets.extend((start + 1, len(self._program)))
            return
        skips = []
        for _ in range(most - least):
            skip = _Jump([len(self._program) + 1])
            skips.append(skip)
            self._program.append(skip)
            self._emit(node)
        for skip in skips:
            skip.targets.append(len(self._program))
