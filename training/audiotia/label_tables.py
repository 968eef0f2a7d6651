"""Classification data sets whose metadata is a table, in their official formats.

AudioSet's segments and class_labels_indices.csv, FSD50K's ground truth and vggsound.csv as their pages offer them;
UrbanSound8K.csv and esc50.csv out of the data sets; the DCASE 2017 challenge's weak labels (task 4) and TUT Acoustic
Scenes 2017's meta.txt (task 1).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from training.audiotia.labels import LabelReader, Labels, spaced
from training.audiotia.reader import Tally, found_by
from training.audiotia.tables import read_table, require_columns


@dataclass(frozen=True, kw_only=True)
class AudioSetLabels(LabelReader):
    """A data set with labels of the AudioSet ontology.

    Args:
        ontology (`Path`): names of the labels' ids ("/m/09x0r"): AudioSet's `class_labels_indices.csv`
            (`index,mid,display_name`), or its `ontology.json`, which has also those that AudioSet leaves out.
    """

    ontology: Path | None = field(default=None, metadata=found_by("find_one"))

    @cached_property
    def names(self) -> dict[str, str]:
        """Names by id."""
        if self.ontology.suffix == ".json":
            return {entry["id"]: entry["name"] for entry in json.loads(self.ontology.read_text(encoding="utf-8"))}
        names = {}
        for row in read_table(self.ontology):
            require_columns(self.ontology, row, ["mid", "display_name"])
            names[row["mid"]] = row["display_name"]
        return names

    def named(self, path: Path, ids: str) -> Labels:
        """The names of comma-separated ids."""
        try:
            return tuple(self.names[entry.strip()] for entry in ids.split(",") if entry.strip())
        except KeyError as error:
            raise ValueError(f"{path} has the label {error}, which {self.ontology} does not name.") from None


@dataclass(frozen=True, kw_only=True)
class AudioSet(AudioSetLabels):
    """AudioSet (Gemmeke et al., 2017): `# YTID, start_seconds, end_seconds, positive_labels` below two comments."""

    youtube = True
    required = frozenset({"YTID", "positive_labels"})
    pattern = "{YTID}.wav"

    def __post_init__(self):
        super().__post_init__()
        if self.path and self.ontology is None:
            raise ValueError(
                f"The source {self.name!r} lacks the option ontology (class_labels_indices.csv or ontology.json): "
                "AudioSet's segments have ids for labels."
            )

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        columns = None
        with path.open(encoding=self.encoding) as file:
            for number, line in enumerate(file, start=1):
                if line.startswith("#"):
                    columns = [name.strip() for name in line[1:].split(",")]
                    continue
                # The labels are the rest of the line, in quotes behind a space, which csv takes for text.
                fields = [value.strip().strip('"') for value in line.split(",", maxsplit=3)]
                if columns is None or len(columns) != 4 or len(fields) != 4:
                    raise ValueError(
                        f"{path}, line {number}: expected four fields below a line '# YTID, start_seconds, "
                        f"end_seconds, positive_labels', got {line.strip()!r:.120} below {columns}."
                    )
                yield dict(zip(columns, fields, strict=True))

    def labels_of(self, path: Path, record: dict[str, Any]) -> Labels:
        return self.named(path, record["positive_labels"])


@dataclass(frozen=True, kw_only=True)
class Fsd50k(AudioSetLabels):
    """FSD50K (Fonseca et al., 2022): `fname,labels,mids[,split]`. With `ontology`, the labels are named as in AudioSet
    ("Gunshot, gunfire"), without as in the file ("Gunshot and gunfire")."""

    required = frozenset({"fname", "labels", "mids"})
    pattern = "{fname}.wav"

    def labels_of(self, path: Path, record: dict[str, Any]) -> Labels:
        if self.ontology is not None:
            return self.named(path, record["mids"])
        return tuple(spaced(label) for label in record["labels"].split(",") if label)


@dataclass(frozen=True, kw_only=True)
class VggSound(LabelReader):
    """VGGSound (Chen et al., 2020): `ytid,start,label,split` without a header; `where: {split: train}`."""

    youtube = True
    required = frozenset({"ytid", "start", "label", "split"})
    pattern = "{ytid}_{start:0>6}.wav"

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        return read_table(path, ("ytid", "start", "label", "split"), encoding=self.encoding)

    def labels_of(self, path: Path, record: dict[str, Any]) -> Labels:
        return (record["label"].strip(),)


@dataclass(frozen=True, kw_only=True)
class UrbanSound8k(LabelReader):
    """UrbanSound8K (Salamon et al., 2014): `slice_file_name,fsID,start,end,salience,fold,classID,class`."""

    required = frozenset({"slice_file_name", "fold", "class"})
    pattern = "fold{fold}/{slice_file_name}"

    def labels_of(self, path: Path, record: dict[str, Any]) -> Labels:
        return (spaced(record["class"]),)


@dataclass(frozen=True, kw_only=True)
class Esc50(LabelReader):
    """ESC-50 (Piczak, 2015): `filename,fold,target,category,esc10,src_file,take`."""

    required = frozenset({"filename", "category"})
    pattern = "{filename}"

    def labels_of(self, path: Path, record: dict[str, Any]) -> Labels:
        return (spaced(record["category"]),)


@dataclass(frozen=True, kw_only=True)
class Dcase17(LabelReader):
    """DCASE 2017 task 4 (Mesaros et al., 2017), `groundtruth_weak_label_*.csv`: filename, start, end and label of 17
    events, separated by tabs, without a header, a line for each label of a clip."""

    youtube = True
    required = frozenset({"filename", "label"})
    pattern = "Y{filename}"

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        return read_table(path, ("filename", "start", "end", "label"), delimiter="\t", encoding=self.encoding)

    def labels_of(self, path: Path, record: dict[str, Any]) -> Labels:
        return (record["label"].strip(),)

    def clips(self, tally: Tally) -> Iterator[tuple[str, Labels]]:
        labels: dict[str, Labels] = {}
        for clip, (label,) in super().clips(tally):
            if label not in labels.setdefault(clip, ()):
                labels[clip] += (label,)
        yield from labels.items()


@dataclass(frozen=True, kw_only=True)
class Tut2017(LabelReader):
    """TUT Acoustic Scenes 2017 (Mesaros et al., 2016), `meta.txt`: file, scene and, in the development set, location,
    separated by tabs, without a header."""

    required = frozenset({"filename", "scene"})
    pattern = "{filename}"

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open(encoding=self.encoding) as file:
            width = len(file.readline().split("\t"))
        return read_table(path, ("filename", "scene", "location")[:width], delimiter="\t", encoding=self.encoding)

    def labels_of(self, path: Path, record: dict[str, Any]) -> Labels:
        return (spaced(record["scene"]),)


__all__ = ["AudioSet", "Dcase17", "Esc50", "Fsd50k", "Tut2017", "UrbanSound8k", "VggSound"]
