"""Mixtures: which sources a model is trained on, in which shares, from YAML to a memory-mapped data set.

    seed: 0
    sources:
    - reader: audiocaps              # one of training.audiotia.readers.READERS
      name: audiocaps                # by default the reader's name; each source has its own
      path: audiocaps/train.csv      # under the data folder; also a list or a glob
      share: 1.0                     # 0.5: each row with that probability, by seed; 2: each row twice
      exclude: audiocaps/test.csv    # clips that must stay out: names a line, or a table with a column of them
      licence: MIT                   # for the data card, as is `url`
      ...                            # the reader's own options

The rows are cached as Arrow, under a key of the mixture's content, its files' and the readers' code.
"""

import hashlib
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import yaml
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm
from transformers.utils import logging

from training.audiotia.card import Counting, DataCard, SourceCard, count_distinct
from training.audiotia.clips import AUDIO_SUFFIXES, ClipIndex, read_clip_names
from training.audiotia.examples import EXAMPLE_FEATURES, Example
from training.audiotia.labels import LabelReader
from training.audiotia.reader import Places, Reader, Tally
from training.audiotia.readers import READERS

logger = logging.get_logger(__name__)

ROW_FEATURES = datasets.Features({**EXAMPLE_FEATURES, "length": datasets.Value("int32")})
ROWS_FILE, CARD_FILE = "examples.arrow", "card.json"


@dataclass(frozen=True)
class Source:
    """One source of a mixture; `options` are those of its reader."""

    reader: str
    name: str
    share: float = 1.0
    exclude: Any = None
    licence: str | None = None
    url: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, given: Any) -> "Source":
        if not isinstance(given, Mapping) or "reader" not in given:
            raise ValueError(f"A source is {given!r:.200}, expected a mapping with the key 'reader'.")
        known = ("reader", "name", "share", "exclude", "licence", "url")
        own = {key: given[key] for key in known if key in given}
        options = {key: value for key, value in given.items() if key not in known}
        source = cls(**{"name": given["reader"], **own}, options=options)
        if source.reader not in READERS:
            raise ValueError(f"There is no reader {source.reader!r}; known: {', '.join(READERS)}.")
        share = source.share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < float("inf"):
            raise ValueError(f"The source {source.name!r} has share {share!r}, expected a number above 0.")
        if source.reader == "drawn" and (share != 1 or source.exclude):
            raise ValueError(f"The source {source.name!r} is drawn: its stages say how much, not share or exclude.")
        return source


class _Exclusions:
    """Clips to leave out, and which of them were met."""

    def __init__(self, names: list[str]):
        self.names = list(dict.fromkeys(names))
        self._index = ClipIndex((name, name) for name in self.names)
        self._met: set[str] = set()

    def hit(self, clip: str | None, youtube: bool) -> bool:
        if not self.names or clip is None:
            return False
        found = self._index.find(clip, youtube)
        self._met.update(found)
        return bool(found)

    def unmatched(self) -> list[str]:
        return [name for name in self.names if name not in self._met]


@dataclass(frozen=True)
class Mixture:
    """Sources in their order.

    Args:
        sources (`tuple[Source, ...]`)
        seed (`int`): of shares and of drawn examples.
        base_dir (`Path`): from where files of the mixture itself (descriptions and questions of drawn examples) are
            named; all others lie under the data folder.
    """

    sources: tuple[Source, ...]
    seed: int = 0
    base_dir: Path = Path()

    @classmethod
    def load(cls, mixture: str | Path | Mapping[str, Any], base_dir: str | Path | None = None) -> "Mixture":
        """A mixture from its YAML file, or from the same as a mapping.

        Args:
            mixture (path or mapping): a relative path starts at `base_dir`.
            base_dir (path, *optional*): see the class; of a file its own folder, whatever is given.

        Raises:
            FileNotFoundError, ValueError: for a file that is not there, unknown keys and readers, names that occur
                twice.
        """
        folder = Path(base_dir) if base_dir is not None else Path()
        where = "The mixture"
        if not isinstance(mixture, Mapping):
            path = folder / mixture
            if not path.is_file():
                raise FileNotFoundError(f"No such mixture: {path}")
            where, folder = str(path), path.parent
            mixture = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(mixture, Mapping) or not mixture.get("sources"):
            raise ValueError(f"{where} is {mixture!r:.200}, expected a mapping with a list of sources.")
        if unknown := sorted(set(mixture) - {"seed", "sources"}):
            raise ValueError(f"{where} has the unknown keys {', '.join(unknown)}; known: seed, sources.")
        sources = tuple(map(Source.from_mapping, mixture["sources"]))
        names = [source.name for source in sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{where} has several sources called {', '.join(twice)}: give them a name each.")
        return cls(sources, mixture.get("seed", 0), folder)

    def with_options(self, name: str, **options: Any) -> "Mixture":
        """The same mixture with more, or other, options of one source."""
        if name not in (names := [source.name for source in self.sources]):
            raise ValueError(f"There is no source {name!r}; the mixture has {', '.join(names)}.")
        return replace(
            self,
            sources=tuple(
                replace(source, options={**source.options, **options}) if source.name == name else source
                for source in self.sources
            ),
        )

    def reader(self, source: Source, data_dir: Path, seed: int | None = None) -> Reader:
        """The opened reader of a source.

        Raises:
            FileNotFoundError, ValueError: for missing files, unknown or missing options.
        """
        places = Places(Path(data_dir), self.base_dir)
        return READERS[source.reader].open(source.name, source.options, places, self.seed if seed is None else seed)

    def label_combinations(self, data_dir: Path, name: str) -> Counter[tuple[str, ...]]:
        """The combinations of labels in a classification source, of which descriptions are wanted, and their clips.

        The source's own descriptions may still be missing.
        """
        source = next((source for source in self.sources if source.name == name), None)
        if source is None or not issubclass(READERS[source.reader], LabelReader):
            known = [source.name for source in self.sources if issubclass(READERS[source.reader], LabelReader)]
            raise ValueError(f"{name!r} is no source with labels; the mixture has {', '.join(known) or 'none'}.")
        options = {key: value for key, value in source.options.items() if key != "descriptions"}
        return self.reader(replace(source, options=options), data_dir).combinations()

    def check(self, data_dir: Path) -> None:
        """Tells all that can be told without reading the sources.

        Raises:
            FileNotFoundError, ValueError: missing files and columns, unknown options, exclusion lists that cannot be
                read; of all sources together.
        """
        errors: list[Exception] = []
        for source in self.sources:
            try:
                self.reader(source, data_dir).check()
                self._exclusions(source, data_dir)
            except (FileNotFoundError, ValueError) as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            kind = FileNotFoundError if all(isinstance(error, FileNotFoundError) for error in errors) else ValueError
            raise kind("\n".join([f"{len(errors)} of {len(self.sources)} sources cannot be read:", *map(str, errors)]))

    def examples(self, data_dir: Path, seed: int | None = None, card: DataCard | None = None) -> Iterator[Example]:
        """All examples, source by source in the order of their files.

        Args:
            data_dir (`Path`): where the sources' files lie.
            seed (`int`, *optional*): in place of the mixture's.
            card (`DataCard`, *optional*): is filled.
        """
        seed = self.seed if seed is None else seed
        hashes = []
        for source in self.sources:
            counting = Counting(SourceCard(source.name, source.reader, source.licence, source.url, source.share))
            yield from self._examples_of(source, data_dir, seed, counting)
            counting.finish()
            if card is not None:
                card.sources.append(counting.card)
                hashes.append(counting.hashes)
        if card is not None:
            card.seed = seed
            card.distinct_descriptions = count_distinct(hashes)

    def _examples_of(self, source: Source, data_dir: Path, seed: int, counting: Counting) -> Iterator[Example]:
        reader = self.reader(source, data_dir, seed)
        exclusions = self._exclusions(source, data_dir)
        card, tally, offered = counting.card, Tally(), 0
        # Of its own, so that what is drawn of a source does not depend on the others.
        chance = random.Random(f"{seed} {source.name}")
        whole, part = divmod(source.share, 1)
        for example in reader.examples(tally):
            offered += 1
            if exclusions.hit(example.audio, reader.youtube):
                card.excluded += 1
                continue
            for _ in range(int(whole) + (part > 0 and chance.random() < part)):
                counting.take(example)
                yield example
        card.offered(tally, offered)
        unmatched = exclusions.unmatched()
        card.exclusion_names, card.exclusion_names_unmatched = len(exclusions.names), len(unmatched)
        card.unmatched_examples = unmatched[:5]

    def _exclusions(self, source: Source, data_dir: Path) -> _Exclusions:
        return _Exclusions([name for table in self._lists(source, data_dir) for name in read_clip_names(*table[:2])])

    def _lists(self, source: Source, data_dir: Path) -> tuple:
        if source.exclude is None:
            return ()
        places = Places(Path(data_dir), self.base_dir)
        return places.find_tables(source.exclude, "data", f"exclude of the source {source.name!r}")

    def key(self, data_dir: Path, seed: int | None = None) -> str:
        """A hash of what the rows are a function of: the mixture, its files' content, the code of the readers."""
        digest = hashlib.sha256()
        content = {"seed": self.seed if seed is None else seed, "sources": [asdict(source) for source in self.sources]}
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
        for source in self.sources:
            files = [*self.reader(source, data_dir).files(), *(table.path for table in self._lists(source, data_dir))]
            for file in files:
                digest.update(f"\n{source.name} {file.name} ".encode())
                # Of sounds the names are read alone.
                if file.suffix.lower() not in AUDIO_SUFFIXES:
                    digest.update(_file_digest(file))
        folder = Path(__file__).parent
        for module in (*sorted(folder.glob("*.py")), folder.parent / "music.py"):
            digest.update(_file_digest(module))
        return digest.hexdigest()[:24]


class MixtureResult(NamedTuple):
    """The rows, memory-mapped, with the columns of `ROW_FEATURES`, and what is known of them."""

    dataset: datasets.Dataset
    card: DataCard


def build_mixture(
    mixture: Mixture,
    data_dir: Path,
    cache_dir: Path,
    seed: int | None = None,
    batch_size: int = 10_000,
    key: str | None = None,
) -> MixtureResult:
    """The rows of a mixture from the cache, where they are written if they are not there.

    Args:
        mixture (`Mixture`)
        data_dir (`Path`): where the sources' files lie.
        cache_dir (`Path`): where the rows are kept, in a folder named by `Mixture.key`.
        seed (`int`, *optional*): in place of the mixture's.
        batch_size (`int`): rows in memory at a time.
        key (`str`, *optional*): `Mixture.key`, where the caller has it: it takes a hash of every file.

    Returns:
        `MixtureResult`: the rows, source by source in the order of their files, and the data card.

    Raises:
        FileNotFoundError, ValueError: for missing or malformed files, and for a mixture without a single row.
    """
    folder = Path(cache_dir) / f"mixture-{key or mixture.key(data_dir, seed)}"
    if not folder.exists():
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        # Only finished rows get the name that is looked for.
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix="unfinished-") as partial:
            unfinished = Path(partial) / "mixture"
            unfinished.mkdir()
            card = DataCard()
            _write(mixture.examples(data_dir, seed, card), unfinished / ROWS_FILE, batch_size)
            if not card.rows:
                reasons = " ".join(note for source in card.sources for note in source.warnings())
                raise ValueError(f"The mixture has not a single row. {reasons}")
            (unfinished / CARD_FILE).write_text(json.dumps(card.to_dict(), indent=1) + "\n", encoding="utf-8")
            try:
                os.rename(unfinished, folder)
            except OSError:
                if not folder.exists():  # else another process was faster, with the same rows
                    raise
    card = DataCard.from_dict(json.loads((folder / CARD_FILE).read_text(encoding="utf-8")))
    for source in card.sources:
        for warning in source.warnings():
            logger.warning(warning)
    return MixtureResult(datasets.Dataset.from_file(str(folder / ROWS_FILE)), card)


def _write(examples: Iterator[Example], path: Path, batch_size: int) -> None:
    columns: dict[str, list[Any]] = {name: [] for name in ROW_FEATURES}
    with ArrowWriter(path=str(path), features=ROW_FEATURES) as writer:
        for example in tqdm(examples, desc="mixture", unit=" rows", delay=2):
            for name, values in columns.items():
                values.append(getattr(example, name))
            columns["further_turns"][-1] = [turn._asdict() for turn in example.further_turns]
            if len(columns["length"]) == batch_size:
                writer.write_batch(columns)
                columns = {name: [] for name in ROW_FEATURES}
        if columns["length"]:
            writer.write_batch(columns)
        writer.finalize()


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


__all__ = ["ROW_FEATURES", "DataCard", "Mixture", "MixtureResult", "Source", "build_mixture"]
