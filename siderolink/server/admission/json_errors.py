"""Error texts for unique tokens that are not valid JSON, equal to those of Go's encoding/json, which other servers use."""

import json
import re
from typing import Final

_TYPE: Final = "NodeUniqueToken"
_FIELDS: Final = {"fingerprint": "Fingerprint", "token": "Token"}
_ENDED: Final = "unexpected end of JSON input"
_NUMBER: Final = re.compile(r"(?<![\d.eE+-])-?\d+(\.\d+)?\Z")
_LITERALS: Final = {"t": "true", "f": "false", "n": "null"}
_KINDS: Final = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}


def unique_token_error(text: str) -> str:
    """The parser's error text; empty for a valid token."""
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        return _syntax_error(text, error.msg, error.pos)
    except _Constant as constant:
        return _invalid(text, text.find(str(constant)), "looking for beginning of value")
    except RecursionError:
        return _ENDED  # a token of this length cannot close that many brackets
    if document is not None and not isinstance(document, dict):
        return f"json: cannot unmarshal {_KINDS[type(document)]} into Go value of type jointoken.{_TYPE}"
    for name, value in (document or {}).items():
        field = _FIELDS.get(name.lower())
        if field is not None and value is not None and not isinstance(value, str):
            return f"json: cannot unmarshal {_KINDS[type(value)]} into Go struct field {_TYPE}.{field} of type string"
    return ""


class _Constant(Exception):
    """Raised for NaN and Infinity, which Python accepts although JSON does not have them."""


def _no_constant(name: str) -> None:
    raise _Constant(name)


def _syntax_error(text: str, message: str, at: int) -> str:
    if message.startswith("Illegal trailing comma"):
        at = len(text) - len(text[at + 1 :].lstrip(" \t\r\n"))
        place = "looking for beginning of " + ("object key string" if _is_in_object(text, at) else "value")
        return _invalid(text, at, place)
    if message.startswith("Invalid \\escape"):
        return _invalid(text, at + 1, "in string escape code", " ")
    if message.startswith("Invalid \\u"):
        first = at = text.rindex("\\u", 0, at + 3) + 2
        while text[at : at + 1] and text[at] in "0123456789abcdefABCDEF":
            at += 1
        if at - first >= 4:
            return _ENDED
        return _invalid(text, at, "in \\u hexadecimal character escape", " ")
    if message.startswith("Unterminated string"):
        return _invalid(text, len(text), "in string escape code", " ") if _ends_in_escape(text, at) else _ENDED
    if message == "Expecting value":
        return _bad_value(text, at)
    number = _NUMBER.search(text[:at])
    if number is not None and (text[at : at + 1] in ("e", "E") or (text[at : at + 1] == "." and not number[1])):
        if text[at] == ".":
            return _invalid(text, at + 1, "after decimal point in numeric literal", " ")
        at += 2 if text[at + 1 : at + 2] in ("+", "-") else 1
        return _invalid(text, at, "in exponent of numeric literal", " ")
    return _invalid(text, at, _place(text, message, at))


def _ends_in_escape(text: str, at: int) -> bool:
    """Whether a string that begins here ends with a backslash."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1 and len(text) > at + 1


def _place(text: str, message: str, at: int) -> str:
    if message.startswith("Expecting property name"):
        return "looking for beginning of object key string"
    if message.startswith("Expecting ':'"):
        return "after object key"
    if message.startswith("Expecting ','"):
        return "after object key:value pair" if _is_in_object(text, at) else "after array element"
    return "after top-level value" if message.startswith("Extra data") else "in string literal"


def _bad_value(text: str, at: int) -> str:
    first = text[at : at + 1]
    if first == "-":
        return _invalid(text, at + 1, "in numeric literal", " ")
    literal = _LITERALS.get(first, "")
    for number, expected in enumerate(literal):
        if text[at + number : at + number + 1] != expected:
            return _invalid(text, at + number, f"in literal {literal} (expecting '{expected}')", " ")
    return _invalid(text, at, "looking for beginning of value")


def _is_in_object(text: str, at: int) -> bool:
    """Whether the innermost open bracket before this position is a brace."""
    brackets: list[str] = []
    is_text = is_escaped = False
    for character in text[:at]:
        if is_text:
            is_text = is_escaped or character != '"'
            is_escaped = character == "\\" and not is_escaped
        elif character == '"':
            is_text = True
        elif character in "{[":
            brackets.append(character)
        elif character in "}]" and brackets:
            brackets.pop()
    return brackets[-1:] == ["{"]


def _invalid(text: str, at: int, place: str, at_end: str = "") -> str:
    """`at_end` is the character that the parser sees when the text ends inside a literal, a number or an escape."""
    found = text[at : at + 1] or at_end
    if not found:
        return _ENDED
    character = chr(found.encode("utf-8", "replace")[0])
    if character == "'":
        shown = "\\'"
    elif character == '"':
        shown = '"'
    else:
        shown = json.dumps(character)[1:-1].replace("\\u00", "\\x") if character < " " else character.replace("\\", "\\\\")
    return f"invalid character '{shown}' {place}"
