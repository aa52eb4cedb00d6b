"""A JSON array of rows, parsed one row at a time: a file of any size needs the memory of one row."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO

from qcore.data import streams
from qcore.data.streams import not_utf8, too_long
from qcore.errors import CalibrationError, escaped

# How much of the array is decoded at a time.
ARRAY_PIECE_BYTES = 2**20


def array_rows(stream: IO[bytes], name: str) -> Iterator[tuple[str, object]]:
    """("name[index]", value) of every row of a JSON array, parsed one at a time.

    Raises:
        CalibrationError: CALIB_LINE, CALIB_UTF8.
        FormatError: LIMIT_LINE.
    """
    text = _ArrayText(stream, name)
    text.expect("[")
    index = 0
    while not (index == 0 and text.next_is("]")):
        yield f"{name}[{index}]", text.value(index)
        index += 1
        if text.next_is("]"):
            break
        text.expect(",")
    text.expect("")


class _ArrayText:
    """The text of an array, of which no more is held than one row and one piece."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read_bytes = 0
        self._buffer = ""
        self._at = 0
        self._ended = False
        self._json = json.JSONDecoder()

    def _fill(self, size: int) -> None:
        """Reads `size` bytes more; what was used before is forgotten."""
        data = self._stream.read(size)
        pending = len(self._decoder.getstate()[0])
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            bad = self._read_bytes - pending + error.start
            raise not_utf8(self._name, bad + 1, error.object[error.start]) from None
        self._read_bytes += len(data)
        self._ended = not data
        self._buffer = self._buffer[self._at :] + more
        self._at = 0

    def _skip_space(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._buffer):
                character = self._buffer[self._at]
                if character not in " \t\r\n":
                    return character
                self._at += 1
            if self._ended:
                return ""
            self._fill(ARRAY_PIECE_BYTES)

    def next_is(self, character: str) -> bool:
        """Takes the character if it comes next."""
        found = self._skip_space() == character
        self._at += found and bool(character)
        return found

    def expect(self, character: str) -> None:
        """Takes the character, or the end for an empty one."""
        if not self.next_is(character):
            found = self._skip_space()
            wanted = f"expected {character!r}" if character else "expected its end"
            raise self._broken(f"{wanted}, found {found!r}" if found else f"{wanted}, found none")

    def value(self, index: int) -> object:
        """The next value."""
        if not self._skip_space():
            raise self._broken("it ends in the middle")
        while True:
            try:
                value, end = self._json.raw_decode(self._buffer, self._at)
                # A number at the end of the piece may go on in the next.
                if end < len(self._buffer) or self._ended:
                    self._at = end
                    return value
            except RecursionError:
                raise self._broken(f"row {index} is nested too deeply") from None
            except ValueError as error:
                if self._ended or self._is_final(error):
                    raise self._broken(escaped(str(error), 120)) from None
            if len(self._buffer) - self._at > streams.MAX_LINE_BYTES:
                raise too_long(f"{self._name}[{index}]")
            # As much again as is held, so that trying again and again stays linear.
            self._fill(max(ARRAY_PIECE_BYTES, len(self._buffer) - self._at))

    def _is_final(self, error: ValueError) -> bool:
        """Whether more text cannot mend what was found wrong."""
        if not isinstance(error, json.JSONDecodeError):
            return True
        longest_literal = len("-Infinity")
        cut = error.msg.startswith(("Unterminated", "Invalid \\"))
        return not cut and error.pos < len(self._buffer) - longest_literal

    def _broken(self, why: str) -> CalibrationError:
        return CalibrationError(
            f"{self._name} begins like a JSON array and is none: {escaped(why, 200)}.",
            code="CALIB_LINE",
            where=self._name,
            needed="a JSON array of rows, or JSONL",
            remedy="Repair it, or write JSONL, one row a line.",
        )
