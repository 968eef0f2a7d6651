"""What a reader is: files of one source in their official format, read as examples. Its fields are its options."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from training.audiotia.examples import AUDIO_TYPES, Example
from training.audiotia.tables import read_records, require_columns


@dataclass
class Tally:
    """What became of a source's records besides those that were read as examples."""

    not_selected: int = 0  # `where` asked for others
    incomplete: int = 0  # an empty caption, question or answer
    without_description: int = 0  # nothing known to embed in place of the sound


class Table(NamedTuple):
    """A file and, where they are not the usual ones, the names of its columns."""

    path: Path
    clip: str | None = None
    caption: str | None = None


class Places(NamedTuple):
    """Where relative paths start: at the data folder, or at the mixture's file."""

    data: Path
    mixture: Path

    def find(self, name: Any, where: str, option: str) -> tuple[Path, ...]:
        """The files of a name or glob.

        Raises:
            FileNotFoundError: where there is none; names the option.
        """
        if not isinstance(name, str | Path):
            raise ValueError(f"{option} has {name!r} where the name of a file was expected.")
        folder = self.mixture if where == "mixture" else self.data
        path = folder / name
        if path.exists():
            return (path,)
        if any(letter in str(name) for letter in "*?["):
            # Path.glob takes no absolute patterns.
            root = Path(path.anchor) if path.is_absolute() else Path()
            if found := tuple(sorted(root.glob(str(path.relative_to(root))))):
                return found
        raise FileNotFoundError(f"No such file: {path} ({option}).")

    def find_one(self, name: Any, where: str, option: str) -> Path:
        found = self.find(name, where, option)
        if len(found) > 1:
            raise ValueError(f"{option} is {name!r}, which {len(found)} files match; expected one.")
        return found[0]

    def find_all(self, names: Any, where: str, option: str) -> tuple[Path, ...]:
        listed = names if isinstance(names, list | tuple) else [names]
        if not listed:
            raise ValueError(f"{option} is an empty list, expected at least one file.")
        return tuple(path for name in listed for path in self.find(name, where, option))

    def find_tables(self, names: Any, where: str, option: str) -> tuple[Table, ...]:
        """Like `find_all`; an entry may also be a mapping of `path`, `clip` and `caption`."""
        tables = []
        for entry in names if isinstance(names, list | tuple) else [names]:
            entry = entry if isinstance(entry, Mapping) else {"path": entry}
            if "path" not in entry or not set(entry) <= set(Table._fields):
                raise ValueError(f"{option} has {dict(entry)}, expected a file, or path with clip and caption columns.")
            rest = {key: value for key, value in entry.items() if key != "path"}
            tables += [Table(path, **rest) for path in self.find_all(entry["path"], where, option)]
        return tuple(tables)

    def find_named(self, names: Any, where: str, option: str) -> dict[str, Path]:
        """A mapping of names to files."""
        if not isinstance(names, Mapping):
            raise ValueError(f"{option} is {names!r}, expected a mapping of names to files.")
        return {key: self.find_one(name, where, f"{key} of {option}") for key, name in names.items()}


def found_by(method: str, where: str = "data") -> dict[str, str]:
    """Metadata of a reader's field that names files: by which method of `Places` they are found, and where they lie."""
    return {"method": method, "where": where}


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A source of examples.

    Args:
        name (`str`): the source's name.
        seed (`int`): of whatever is drawn.
        audio_type (`str`): one of `AUDIO_TYPES`.
        encoding (`str`): of the text files.
    """

    # Clips may be named by the id of a YouTube video alone.
    youtube: ClassVar[bool] = False

    name: str
    seed: int = 0
    audio_type: str = "sound"
    encoding: str = "utf-8-sig"

    def __post_init__(self):
        if self.audio_type not in AUDIO_TYPES:
            raise ValueError(
                f"{self.name}: audio_type is {self.audio_type!r}, expected one of {', '.join(AUDIO_TYPES)}."
            )

    @classmethod
    def options(cls) -> list[str]:
        """Names of the options that a mixture may give."""
        return [option.name for option in fields(cls) if option.name not in ("name", "seed")]

    @classmethod
    def open(cls, name: str, options: Mapping[str, Any], places: Places, seed: int = 0) -> "Reader":
        """The reader of a source whose options are as a mixture gives them.

        Raises:
            ValueError: for an unknown or a missing option.
            FileNotFoundError: for a file that is not there.
        """
        if unknown := sorted(set(options) - set(cls.options())):
            raise ValueError(
                f"The source {name!r} has the unknown options {', '.join(unknown)}; known: {', '.join(cls.options())}."
            )
        given: dict[str, Any] = {"name": name, "seed": seed}
        for option in fields(cls):
            if option.name in options:
                value = options[option.name]
                if option.metadata:
                    find = getattr(places, option.metadata["method"])
                    value = find(value, option.metadata["where"], f"{option.name} of the source {name!r}")
                given[option.name] = value
            elif option.name not in given and _is_required(option):
                raise ValueError(f"The source {name!r} lacks the option {option.name}.")
        return cls(**given)

    def files(self) -> list[Path]:
        """All files that the examples depend on."""
        found: list[Path] = []
        for option in fields(self):
            if option.metadata:
                found += _paths(getattr(self, option.name))
        return found

    def check(self) -> None:
        """Looks at the beginning of the files: raises for columns that are missing."""
        raise NotImplementedError(f"{type(self).__name__}.check")

    def examples(self, tally: Tally) -> Iterator[Example]:
        """The source's examples, in the order of its files; what is left out is counted in the tally."""
        raise NotImplementedError(f"{type(self).__name__}.examples")


@dataclass(frozen=True, kw_only=True)
class RecordReader(Reader):
    """A source whose files are tables or lists of records.

    Args:
        path (`tuple[Path, ...]`): the source's files.
        audio (`str`, *optional*): pattern of a clip's file name over the columns of its record, in the syntax of
            `str.format`; by default the class's `pattern`.
        where (`Mapping`): values by column; only rows that have them are taken (`{split: train}`, `{fold: [1, 2]}`).
    """

    # What each record has.
    required: ClassVar[frozenset[str]] = frozenset()
    # How the data set's clips are usually named.
    pattern: ClassVar[str] = "{audio}"

    path: tuple[Path, ...] = field(metadata=found_by("find_all"))
    audio: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.where, Mapping):
            raise ValueError(f"{self.name}: where is {self.where!r}, expected values by column.")
        # As text, as tables have them; once, not for each row.
        wanted = {
            column: frozenset(str(value).casefold() for value in (values if isinstance(values, list) else [values]))
            for column, values in self.where.items()
        }
        object.__setattr__(self, "_wanted", wanted)
        object.__setattr__(self, "_needed", self.required | set(wanted))

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """The records of a file, in its official format."""
        return read_records(path, self.encoding)

    def records(self, path: Path) -> Iterator[dict[str, Any]]:
        """The records of a file, each with the columns that are needed."""
        for number, record in enumerate(self.read(path), start=1):
            if not isinstance(record, dict):
                raise ValueError(f"{path}, record {number}, is {record!r:.80}, expected an object.")
            if not self._needed <= record.keys():
                require_columns(path, record, sorted(self._needed))
            yield record

    def check(self) -> None:
        for path in self.path:
            first = next(self.records(path), None)
            if first is None:
                raise ValueError(f"{path} has no records.")
            self.clip(path, first)

    def selected(self, path: Path, tally: Tally) -> Iterator[dict[str, Any]]:
        """The records of a file that `where` asks for."""
        for record in self.records(path):
            if all(str(record[column]).casefold() in values for column, values in self._wanted.items()):
                yield record
            else:
                tally.not_selected += 1

    def clip(self, path: Path, record: Mapping[str, Any]) -> str:
        """The clip's name, by the audio pattern."""
        pattern = self.audio or self.pattern
        try:
            return pattern.format_map(record)
        except KeyError as error:
            raise ValueError(
                f"{path} has the columns {', '.join(map(repr, record))}; the audio pattern {pattern!r} expects {error}."
            ) from None
        except (IndexError, ValueError) as error:
            raise ValueError(f"The audio pattern {pattern!r} is malformed: {error}.") from None


def _is_required(option: Field) -> bool:
    return option.default is MISSING and option.default_factory is MISSING


def _paths(value: Any) -> list[Path]:
    if value is None:
        return []
    if isinstance(value, Path):
        return [value]
    if isinstance(value, Table):
        return [value.path]
    if isinstance(value, Mapping):
        return [path for each in value.values() for path in _paths(each)]
    return [path for each in value for path in _paths(each)]


__all__ = ["Places", "Reader", "RecordReader", "Table", "Tally", "found_by"]
