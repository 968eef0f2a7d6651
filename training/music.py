"""Short pieces of music with captions: unlimited sounds of known instruments, for training the small CLAP.

A piece is drawn by seed, told in words and rendered from a General MIDI soundfont. Drawing and telling need no
soundfont, so the language side can learn from the captions of pieces that nobody plays.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

DRUM_CHANNEL = 9
# What a beat is made of; labels of `Instruments.percussion`.
KICK, SNARE, HAT = "kick drum", "snare drum", "hi-hat"
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
# Beats a minute up to which music is called slow, and from which it is called fast.
SLOW, FAST = 85, 130
# MIDI keys below which notes are called low, and above which they are called high.
LOW, HIGH = 50, 76


@dataclass(frozen=True)
class Instrument:
    """A label with the presets that sound like it (0 to 127) and its compass in MIDI keys."""

    presets: Sequence[int]
    range: Sequence[int]

    def __post_init__(self):
        low, high = self.range
        if not self.presets or not 0 <= low < high <= 127:
            raise ValueError(f"An instrument has presets and a range of MIDI keys, got {self}.")


@dataclass(frozen=True)
class Instruments:
    """What General MIDI plays, by label; see `mats_tiny/instruments.yaml`.

    Attributes:
        melodic: what plays notes.
        percussion: keys of the drum channel; those of a beat must be among them.
        drum_kit: the label of a beat.
    """

    melodic: Mapping[str, Instrument]
    percussion: Mapping[str, Sequence[int]]
    drum_kit: str

    def __post_init__(self):
        if not self.melodic:
            raise ValueError("There are no melodic instruments.")
        if missing := [label for label in (KICK, SNARE, HAT) if not self.percussion.get(label)]:
            raise ValueError(f"A beat needs keys of {', '.join(missing)}; percussion is {self.percussion}.")

    @classmethod
    def from_yaml(cls, path: Path) -> "Instruments":
        """Raises `FileNotFoundError`, and `ValueError` for other keys than those above."""
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or set(content) != {"melodic", "percussion", "drum_kit"}:
            raise ValueError(f"{path} holds {content!r:.200}, expected melodic, percussion and drum_kit.")
        melodic = {label: Instrument(**fields) for label, fields in content["melodic"].items()}
        return cls(melodic, content["percussion"], content["drum_kit"])

    @property
    def labels(self) -> list[str]:
        return [*self.melodic, *self.percussion, self.drum_kit]


class Note(NamedTuple):
    """Start and length in beats, MIDI key, and velocity (1 to 127)."""

    start: float
    beats: float
    key: int
    velocity: int


@dataclass(frozen=True)
class Part:
    """What one instrument does in a piece; `form` is one of `FORMS`."""

    label: str
    form: str
    notes: tuple[Note, ...]
    preset: int | None  # None: drums

    @property
    def register(self) -> str:
        """ "low", "high" or "" by the mean key; drums have none."""
        if self.preset is None:
            return ""
        mean = sum(note.key for note in self.notes) / len(self.notes)
        return "low" if mean < LOW else "high" if mean > HIGH else ""


@dataclass(frozen=True)
class Piece:
    """Parts that sound together; `tempo` in beats a minute."""

    tempo: float
    parts: tuple[Part, ...]

    @property
    def labels(self) -> list[str]:
        return [part.label for part in self.parts]

    @property
    def pace(self) -> str:
        """ "slow", "fast" or "" for what lies between."""
        return "slow" if self.tempo <= SLOW else "fast" if self.tempo >= FAST else ""


# What is said of a part on its own. {who} is a noun phrase, {pace} and {register} are words or nothing.
FORMS = {
    "note": (
        "{who} {plays} one {register} note.",
        "A single {register} note of {who}.",
        "One long {register} note played on {who}.",
    ),
    "melody": (
        "{who} {plays} a {pace} melody.",
        "{who} {plays} a {pace} tune in {a_register}.",
        "A {pace} melody played on {who}.",
        "Solo music of {who} in {a_register}.",
    ),
    "chords": ("{who} {plays} {pace} chords.", "{pace} chords played on {who}.", "{who} {plays} {register} chords."),
    "arpeggio": ("{who} {plays} {pace} arpeggios.", "{who} {plays} broken chords.", "{pace} arpeggios on {who}."),
    "hits": ("{who} {is_} heard again and again.", "The {pace} rhythm of {who}.", "The repeated sound of {who}."),
    "beat": ("{who} {plays} a {pace} beat.", "A {pace} drum beat.", "{pace} drums."),
}
TOGETHER = ("{a} while {b}.", "{a} and {b}.", "{a} as {b}.")
SOLO_FORMS, ACCOMPANIMENTS = ("note", "melody", "chords", "arpeggio"), ("chords", "arpeggio")


class Composer:
    """Draws pieces and tells them in words.

    Args:
        instruments (`Instruments`)
        phrases (`Mapping[str, str]`): noun phrase of each label, such as "a violin".
        beats (`int`): length of a piece.
    """

    def __init__(self, instruments: Instruments, phrases: Mapping[str, str], beats: int = 16):
        if missing := sorted(set(instruments.labels) - set(phrases)):
            raise ValueError(f"No noun phrases for the instruments {', '.join(missing)}.")
        self.instruments = instruments
        self.phrases = phrases
        self.beats = beats

    def draw(self, rng: random.Random) -> Piece:
        """A solo, drums alone, or a melody with an accompaniment; a function of the generator's state."""
        tempo, kind = rng.uniform(55, 170), rng.random()
        tonic, scale = rng.randrange(12), rng.choice([MAJOR, MINOR])
        if kind < 0.2:
            return Piece(tempo, (self._percussion(rng),))
        if kind < 0.3:
            return Piece(tempo, (self._beat(rng),))
        if kind < 0.75:
            return Piece(tempo, (self._melodic(rng.choice(SOLO_FORMS), tonic, scale, rng),))
        second = self._beat(rng) if kind > 0.9 else self._melodic(rng.choice(ACCOMPANIMENTS), tonic, scale, rng)
        return Piece(tempo, (self._melodic("melody", tonic, scale, rng), second))

    def tell(self, piece: Piece, rng: random.Random) -> str:
        """A sentence about a piece, such as "A violin plays a slow melody while drums play a beat."."""
        if len(piece.parts) == 1:
            return self._tell_part(piece.parts[0], piece.pace, rng)
        first, second = (self._tell_part(part, piece.pace, rng, clause=True).rstrip(".") for part in piece.parts)
        return rng.choice(TOGETHER).format(a=first, b=second[0].lower() + second[1:])

    def _tell_part(self, part: Part, pace: str, rng: random.Random, clause: bool = False) -> str:
        """`clause` asks for a subject and a verb."""
        who = self.phrases[part.label]
        singular = who.startswith(("a ", "an "))
        templates = [
            template
            for template in FORMS[part.form]
            if (part.register or "{a_register}" not in template) and (not clause or "{plays}" in template)
        ]
        text = rng.choice(templates).format(
            who=who,
            plays="plays" if singular else "play",
            is_="is" if singular else "are",
            pace=pace,
            register=part.register,
            a_register=f"a {part.register} register",
        )
        text = " ".join(text.split())  # a word that is nothing leaves two blanks
        return text[0].upper() + text[1:]

    def _percussion(self, rng: random.Random) -> Part:
        label = rng.choice(list(self.instruments.percussion))
        key, step = rng.choice(self.instruments.percussion[label]), rng.choice([0.5, 1, 2])
        starts = np.arange(0, self.beats, step)
        notes = [Note(float(s), 0.5, key, rng.randint(70, 120)) for s in starts if s == 0 or rng.random() < 0.85]
        return Part(label, "hits", tuple(notes), None)

    def _beat(self, rng: random.Random) -> Part:
        """Kick drum on the strong beats, snare drum on the weak ones, hi-hat in between."""
        drums = self.instruments.percussion
        kick, snare, hat = (rng.choice(drums[name]) for name in (KICK, SNARE, HAT))
        notes = []
        for eighth in range(2 * self.beats):
            start = eighth / 2
            if eighth % 4 == 0 or rng.random() < 0.12:
                notes.append(Note(start, 0.5, kick, rng.randint(85, 120)))
            if eighth % 4 == 2:
                notes.append(Note(start, 0.5, snare, rng.randint(85, 120)))
            if rng.random() < 0.85:
                notes.append(Note(start, 0.5, hat, rng.randint(50, 90)))
        return Part(self.instruments.drum_kit, "beat", tuple(notes), None)

    def _melodic(self, form: str, tonic: int, scale: Sequence[int], rng: random.Random) -> Part:
        label = rng.choice(list(self.instruments.melodic))
        instrument = self.instruments.melodic[label]
        keys = [key for key in range(instrument.range[0], instrument.range[1] + 1) if (key - tonic) % 12 in scale]
        # A stretch of the compass about an octave and a half wide, so that register means something.
        width = min(11, len(keys))
        first = rng.randrange(len(keys) - width + 1)
        notes = getattr(self, f"_{form}")(keys[first : first + width], rng)
        return Part(label, form, tuple(notes), rng.choice(instrument.presets))

    def _note(self, keys: Sequence[int], rng: random.Random) -> list[Note]:
        """One note, struck anew where it has died away."""
        key, length = rng.choice(keys), rng.choice([4, 8])
        return [Note(start, length, key, rng.randint(75, 115)) for start in range(0, self.beats, length)]

    def _melody(self, keys: Sequence[int], rng: random.Random) -> list[Note]:
        notes, start, place = [], 0.0, rng.randrange(len(keys))
        while start < self.beats:
            length = rng.choice([0.5, 0.5, 1, 1, 1, 2])
            notes.append(Note(start, length, keys[place], rng.randint(70, 115)))
            place = min(max(place + rng.choice([-2, -1, -1, 0, 1, 1, 2, 4, -3]), 0), len(keys) - 1)
            start += length
        return notes

    def _chords(self, keys: Sequence[int], rng: random.Random) -> list[Note]:
        length, notes = rng.choice([1, 2, 4]), []
        for start in range(0, self.beats, length):
            velocity = rng.randint(65, 105)
            notes += [Note(start, length, key, velocity) for key in _triad(keys, rng)]
        return notes

    def _arpeggio(self, keys: Sequence[int], rng: random.Random) -> list[Note]:
        notes = []
        for bar in range(0, self.beats, 2):
            chord = _triad(keys, rng)
            for step in range(4):
                notes.append(Note(bar + step / 2, 0.5, chord[step % len(chord)], rng.randint(65, 105)))
        return notes


def _triad(keys: Sequence[int], rng: random.Random) -> Sequence[int]:
    """Every other one of five notes of a scale."""
    root = rng.randrange(max(1, len(keys) - 4))
    return keys[root : root + 5 : 2]


class Synthesizer:
    """Renders pieces from a soundfont (`.sf2`) by TinySoundFont, in one channel.

    It is loaded in the process that renders first, so that it can be sent to a data loader's worker.

    Args:
        soundfont (`Path`)
        sampling_rate (`int`): of what is rendered, in Hz.

    Raises:
        FileNotFoundError: no such soundfont.
        ValueError: the file is no soundfont.
        ImportError: tinysoundfont is not installed.
    """

    def __init__(self, soundfont: Path, sampling_rate: int):
        if not Path(soundfont).is_file():
            raise FileNotFoundError(f"No such soundfont: {soundfont}")
        with Path(soundfont).open("rb") as file:
            header = file.read(12)
        if header[:4] != b"RIFF" or header[8:] != b"sfbk":
            raise ValueError(f"{soundfont} is no soundfont: it begins with {header!r}, expected RIFF and sfbk.")
        try:
            import tinysoundfont  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "Rendering music needs tinysoundfont: pip install --no-deps tinysoundfont (its only requirement, "
                "pyaudio, is for playing aloud)."
            ) from error
        self.soundfont = Path(soundfont)
        self.sampling_rate = sampling_rate
        self._synth = self._font = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_synth": None, "_font": None}

    def check(self, instruments: Instruments) -> None:
        """Raises `ValueError` where the soundfont lacks a preset of the instruments."""
        synth, font = self._load()
        missing = {
            label: [preset for preset in instrument.presets if synth.sfpreset_name(font, 0, preset) is None]
            for label, instrument in instruments.melodic.items()
        }
        if lacking := [f"{label} {presets}" for label, presets in missing.items() if presets]:
            raise ValueError(f"{self.soundfont} lacks the presets of {', '.join(lacking)}; General MIDI has them all.")

    def render(self, piece: Piece, samples: int) -> np.ndarray:
        """The first `samples` of a piece, `(samples,)` float32, at a peak of 0.5; shorter pieces end in silence."""
        synth = self._ready()
        channels = {}
        for number, part in enumerate(piece.parts):
            if part.preset is None:
                channels[number] = DRUM_CHANNEL
                synth.program_select(DRUM_CHANNEL, self._font, 0, 0, True)
            else:
                channels[number] = number
                synth.program_select(number, self._font, 0, part.preset)
        per_beat = 60 / piece.tempo * self.sampling_rate
        events = []  # an end comes before a start of the same moment
        for number, part in enumerate(piece.parts):
            for note in part.notes:
                channel = channels[number]
                events.append((round(note.start * per_beat), 1, channel, note.key, note.velocity))
                events.append((round((note.start + note.beats * 0.95) * per_beat), 0, channel, note.key, 0))
        rendered, done = [], 0
        for moment, is_start, channel, key, velocity in [*sorted(events), (samples, 0, 0, 0, 0)]:
            moment = min(moment, samples)
            if moment > done:
                rendered.append(np.frombuffer(bytes(synth.generate(moment - done)), np.float32).reshape(-1, 2).mean(1))
                done = moment
            if done == samples:
                break
            if is_start:
                synth.noteon(channel, key, velocity)
            else:
                synth.noteoff(channel, key)
        synth.sounds_off()
        # Voices fade within 10 ms of that. What is left of them must not sound in the next piece.
        synth.generate(self.sampling_rate // 50)
        waveform = np.concatenate(rendered)
        return waveform * (0.5 / max(float(np.abs(waveform).max()), 1e-6))

    def _ready(self):
        if self._synth is None:
            self._synth, self._font = self._load()
        return self._synth

    def _load(self) -> tuple:
        import tinysoundfont

        synth = tinysoundfont.Synth(samplerate=self.sampling_rate)
        return synth, synth.sfload(str(self.soundfont))


__all__ = ["Composer", "Instrument", "Instruments", "Note", "Part", "Piece", "Synthesizer"]
