"""Captioning data sets in their official formats. A caption is the description and, asked for by template, the answer.

Formats: AudioCaps and Clotho from their repositories' CSV files, WavCaps from the Hub's JSON, MACS from Zenodo's YAML,
MusicCaps from its public CSV, Song Describer from Zenodo's CSV.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from training.audiotia import templates
from training.audiotia.examples import Example
from training.audiotia.reader import RecordReader, Tally


@dataclass(frozen=True, kw_only=True)
class CaptionReader(RecordReader):
    """Records with captions, each of which becomes an example."""

    caption_columns: ClassVar[tuple[str, ...]] = ("caption",)

    def examples(self, tally: Tally) -> Iterator[Example]:
        for path in self.path:
            for record in self.selected(path, tally):
                clip = self.clip(path, record)
                for column in self.caption_columns:
                    caption = (record[column] or "").strip()
                    if caption:
                        turn = templates.captioning(caption, self.audio_type)
                        yield Example(caption, *turn, "CAP", self.audio_type, self.name, clip)
                    else:
                        tally.incomplete += 1


@dataclass(frozen=True, kw_only=True)
class AudioCaps(CaptionReader):
    """AudioCaps (Kim et al., 2019): `audiocap_id,youtube_id,start_time,caption`."""

    youtube = True
    required = frozenset({"youtube_id", "start_time", "caption"})
    pattern = "{youtube_id}_{start_time}.wav"


@dataclass(frozen=True, kw_only=True)
class Clotho(CaptionReader):
    """Clotho (Drossos et al., 2020): `file_name,caption_1,...,caption_5`; five examples a row."""

    caption_columns = ("caption_1", "caption_2", "caption_3", "caption_4", "caption_5")
    required = frozenset({"file_name", *caption_columns})
    pattern = "{file_name}"


@dataclass(frozen=True, kw_only=True)
class WavCaps(CaptionReader):
    """WavCaps (Mei et al., 2023): `{"data": [{"id", "caption", ...}]}`, a file each for its four sources."""

    youtube = True
    required = frozenset({"id", "caption"})
    pattern = "{id}"


@dataclass(frozen=True, kw_only=True)
class Macs(CaptionReader):
    """MACS (Martín-Morató and Mesaros, 2021): `MACS.yaml`, with the sentences of several annotators for each file."""

    required = frozenset({"filename", "annotations"})
    pattern = "{filename}"
    caption_columns = ("sentence",)

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        # The C loader where there is one: the file has 17,000 sentences.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = yaml.load(path.read_text(encoding=self.encoding), Loader=loader)
        if not isinstance(content, dict) or "files" not in content:
            found = list(content) if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} has {found} at its top, expected the key 'files'.")
        yield from content["files"]

    def selected(self, path: Path, tally: Tally) -> Iterator[dict[str, Any]]:
        for record in super().selected(path, tally):
            for annotation in record["annotations"]:
                yield {**record, **annotation}


@dataclass(frozen=True, kw_only=True)
class MusicCaps(CaptionReader):
    """MusicCaps (Agostinelli et al., 2023): `ytid,start_s,end_s,...,caption,...,is_audioset_eval`."""

    youtube = True
    required = frozenset({"ytid", "start_s", "end_s", "caption"})
    pattern = "{ytid}_{start_s}_{end_s}.wav"

    audio_type: str = "music"


@dataclass(frozen=True, kw_only=True)
class SongDescriber(CaptionReader):
    """Song Describer (Manco et al., 2023): `caption_id,track_id,caption,is_valid_subset,...,path,duration`."""

    required = frozenset({"caption", "path"})
    pattern = "{path}"

    audio_type: str = "music"


__all__ = ["AudioCaps", "CaptionReader", "Clotho", "Macs", "MusicCaps", "SongDescriber", "WavCaps"]
