"""Lists in JSON files read one element at a time: OpenAQA's are gigabytes, and memory stays flat."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 20  # characters read at a time
MAX_ELEMENT = 1 << 26  # characters; what grows beyond this is a malformed file, not an element
_WHITESPACE = " \t\r\n"
_DECODER = json.JSONDecoder()


def iterate_json(path: Path, encoding: str = "utf-8-sig") -> Iterator[Any]:
    """The elements of a JSON file, one by one.

    Args:
        path (`Path`): a list `[...]`; or an object, whose list under `"data"` (WavCaps, VocalSound) is read.
        encoding (`str`)

    Raises:
        ValueError: for anything else, naming the file and the place.
    """
    with Path(path).open(encoding=encoding) as file:
        text = _Text(file, path)
        if text.expect("[", "{") == "{":
            _find_data(text)
        if text.peek() == "]":
            return
        while True:
            yield text.decode()
            if text.expect(",", "]") == "]":
                return


def _find_data(text: "_Text") -> None:
    """Goes from behind an object's brace to behind the bracket of its list `"data"`."""
    keys = []
    while text.peek() != "}":
        keys.append(text.decode())
        text.expect(":")
        if keys[-1] == "data":
            text.expect("[")
            return
        text.decode()  # a small value before the list, such as WavCaps' num_captions_per_audio
        if text.peek() != "}":
            text.expect(",")
    raise ValueError(f"{text.path} is a JSON object with the keys {keys}, expected a list, or an object with 'data'.")


class _Text:
    """A window on the text of a file that moves forwards."""

    def __init__(self, file: TextIO, path: Path):
        self.file = file
        self.path = path
        self.window = ""
        self.position = 0  # in the window
        self.before = 0  # characters that have left the window

    def more(self, count: int = CHUNK) -> bool:
        """Reads on and drops what is behind; False, and nothing moved, at the end of the file."""
        chunk = self.file.read(count)
        if not chunk:
            return False
        self.before += self.position
        self.window = self.window[self.position :] + chunk
        self.position = 0
        return True

    def peek(self) -> str:
        """The next character that is not whitespace, `""` at the end of the file."""
        while True:
            while self.position < len(self.window):
                if (character := self.window[self.position]) not in _WHITESPACE:
                    return character
                self.position += 1
            if not self.more():
                return ""

    def expect(self, *characters: str) -> str:
        """Takes the next character, which must be one of these."""
        found = self.peek()
        if found not in characters:
            raise self.error(f"expected {' or '.join(characters)}, found {found or 'the end of the file'}")
        self.position += 1
        return found

    def decode(self) -> Any:
        """The next value; reads on until it is whole."""
        self.peek()
        count = CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self.window, self.position)
            except json.JSONDecodeError as error:
                wrong = self.error(error.msg, error.pos)
                if len(self.window) - self.position > MAX_ELEMENT or not self.more(count):
                    raise wrong from None
            else:
                # A number that ends with the window may go on behind it.
                if end < len(self.window) or not self.more(count):
                    self.position = end
                    return value
            count *= 2

    def error(self, message: str, position: int | None = None) -> ValueError:
        place = self.before + (self.position if position is None else position)
        return ValueError(f"{self.path} is not valid JSON at character {place}: {message}.")


__all__ = ["iterate_json"]
