"""Classification data sets whose labels stand in the names of their files, or in lists of such names."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from training.audiotia.clips import AUDIO_SUFFIXES, clip_parts, read_clip_names
from training.audiotia.labels import LabelReader, Labels


@dataclass(frozen=True, kw_only=True)
class FileNameReader(LabelReader):
    """Clips by their names alone.

    Args:
        path (`tuple[Path, ...]`): the sounds themselves (a glob; they are not opened), or lists of their names, see
            `read_clip_names`. The audio pattern knows `audio`, the file's name, and `folder`, that of its folder.
    """

    required = frozenset({"audio"})
    # With a group `label`, searched in the name without folders and extension.
    form: ClassVar[re.Pattern[str]]
    example: ClassVar[str]
    # The label of what the group holds; what is not here is the label itself.
    names: ClassVar[dict[str, str]] = {}

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected its sounds ({path}/*.wav) or a list of their names.")
        names = [str(path)] if path.suffix.lower() in AUDIO_SUFFIXES else read_clip_names(path, encoding=self.encoding)
        for name in names:
            *folders, file = name.replace("\\", "/").split("/")
            yield {"audio": file, "folder": folders[-1] if folders else ""}

    def labels_of(self, path: Path, record: dict[str, Any]) -> Labels:
        found = self.form.search(clip_parts(record["audio"])[-1])
        if found is None or (self.names and found["label"] not in self.names):
            raise ValueError(
                f"{path}: the clip {record['audio']!r} has no label in its name, expected names as {self.example}."
            )
        return (self.names.get(found["label"], found["label"]),)


@dataclass(frozen=True, kw_only=True)
class Sesa(FileNameReader):
    """SESA, Sound Events for Surveillance Applications (Spadini, 2019): `gunshot_001.wav`."""

    form = re.compile(r"^(?P<label>casual|explosion|gunshot|siren)_")
    example = "gunshot_001.wav"


@dataclass(frozen=True, kw_only=True)
class VocalSound(FileNameReader):
    """VocalSound (Gong et al., 2022): `f0003_0_cough.wav`, or its datafiles, `{"data": [{"wav", "labels"}]}`."""

    form = re.compile(r"^[fm]\d+_\d+_(?P<label>[a-z]+)$")
    example = "f0003_0_cough.wav"
    names = {
        "cough": "cough",
        "laughter": "laughter",
        "sigh": "sigh",
        "sneeze": "sneeze",
        "sniff": "sniff",
        "throatclearing": "throat clearing",
    }


@dataclass(frozen=True, kw_only=True)
class CremaD(FileNameReader):
    """CREMA-D (Cao et al., 2014): actor, sentence, emotion and its level, `1001_DFA_ANG_XX.wav`."""

    form = re.compile(r"^\d{4}_[A-Z]{3}_(?P<label>[A-Z]{3})_")
    example = "1001_DFA_ANG_XX.wav"
    names = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}

    audio_type: str = "speech"


@dataclass(frozen=True, kw_only=True)
class Ravdess(FileNameReader):
    """RAVDESS (Livingstone and Russo, 2018): modality, channel, emotion, intensity, ..., `03-01-06-01-02-01-12.wav`."""

    form = re.compile(r"^\d\d-\d\d-(?P<label>\d\d)(-\d\d){4}$")
    example = "03-01-06-01-02-01-12.wav"
    names = {
        "01": "neutral",
        "02": "calm",
        "03": "happy",
        "04": "sad",
        "05": "angry",
        "06": "fearful",
        "07": "disgust",
        "08": "surprised",
    }

    audio_type: str = "speech"


@dataclass(frozen=True, kw_only=True)
class Gtzan(FileNameReader):
    """GTZAN (Tzanetakis and Cook, 2002): `blues.00001.wav`."""

    form = re.compile(r"^(?P<label>[a-z]+)\.\d+$")
    example = "blues.00001.wav"

    audio_type: str = "music"


@dataclass(frozen=True, kw_only=True)
class BeijingOpera(FileNameReader):
    """Beijing Opera percussion (Tian et al., 2014), named by Freesound: `222132__ajaysm__bangu-01.wav`."""

    form = re.compile(r"(?P<label>bangu|daluo|naobo|xiaoluo)")
    example = "222132__ajaysm__bangu-01.wav"

    audio_type: str = "music"


__all__ = ["BeijingOpera", "CremaD", "FileNameReader", "Gtzan", "Ravdess", "Sesa", "VocalSound"]
