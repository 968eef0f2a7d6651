"""Pieces of music: what is drawn, that what is told of it is true, and how it sounds from a soundfont of one sine."""

import pickle
import random
import re
import struct
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

from training.audiotia.drawn import read_sources
from training.music import (
    FAST,
    FORMS,
    HIGH,
    LOW,
    MAJOR,
    MINOR,
    SLOW,
    Composer,
    Instrument,
    Instruments,
    Note,
    Part,
    Piece,
    Synthesizer,
)

TINY = Path(__file__).parent.parent / "training" / "mats_tiny"
RATE = 8000
BEATS = 16
PLURALS = {"bagpipes", "claves", "hand clap", "maracas", "timpani"}
# Labels of which a clip alone is no music, though pieces are made of them as well.
NO_MUSIC_ALONE = {"bell", "cowbell", "hand clap"}
# The words for what a part does.
TOLD_FORMS = {
    "note": r"\bnote\b",
    "melody": r"\b(melody|tune|solo music)\b",
    "chords": r"(?<!broken )\bchords\b",
    "arpeggio": r"\b(arpeggios|broken chords)\b",
    "hits": r"\b(again and again|rhythm|repeated sound)\b",
    "beat": r"\b(beat|drums)\b",
}


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _list(name: bytes, *chunks: bytes) -> bytes:
    return _chunk(b"LIST", name + b"".join(chunks))


def write_soundfont(path: Path) -> Path:
    """A SoundFont 2 file (specification 2.01, E-mu 1998) of one looped sine with two presets.

    Preset 0 of bank 0 plays a key's own pitch, preset 0 of bank 128 (drums) an octave above it.
    """
    period, key = 64, 69  # key 69 is 440 Hz
    sine = np.round(16000 * np.sin(2 * np.pi * np.arange(10 * period) / period)).astype("<i2")
    instrument, coarse_tune, sample_modes, sample_id = 41, 51, 54, 53  # generators
    presets = [("sine", 0, 0, 0), ("drums", 0, 128, 1), ("EOP", 0, 0, 2)]  # name, preset, bank, first zone
    sample = (0, len(sine), period, 9 * period, 440 * period)  # begin, end, begin and end of the loop, sampling rate
    bags, modulator = struct.Struct("<HH"), bytes(10)

    def generators(*pairs: tuple[int, int]) -> bytes:
        return b"".join(struct.pack("<Hh", *pair) for pair in (*pairs, (0, 0)))

    def shdr(name: bytes, *places: int, pitch: int = 0, kind: int = 0) -> bytes:
        return struct.pack("<20s5IBbHH", name, *places, pitch, 0, 0, kind)

    content = b"".join(
        [
            _list(
                b"INFO",
                _chunk(b"ifil", struct.pack("<HH", 2, 1)),
                _chunk(b"isng", b"EMU8000\0"),
                _chunk(b"INAM", b"One sine\0\0"),
            ),
            _list(b"sdta", _chunk(b"smpl", sine.tobytes() + bytes(2 * 46))),  # 46 empty samples follow each sample
            _list(
                b"pdta",
                _chunk(b"phdr", b"".join(struct.pack("<20sHHHIII", n.encode(), *p, 0, 0, 0) for n, *p in presets)),
                _chunk(b"pbag", bags.pack(0, 0) + bags.pack(1, 0) + bags.pack(3, 0)),
                _chunk(b"pmod", modulator),
                _chunk(b"pgen", generators((instrument, 0), (coarse_tune, 12), (instrument, 0))),
                _chunk(b"inst", struct.pack("<20sH", b"sine", 0) + struct.pack("<20sH", b"EOI", 1)),
                _chunk(b"ibag", bags.pack(0, 0) + bags.pack(2, 0)),
                _chunk(b"imod", modulator),
                _chunk(b"igen", generators((sample_modes, 1), (sample_id, 0))),
                _chunk(b"shdr", shdr(b"sine", *sample, pitch=key, kind=1) + shdr(b"EOS", 0, 0, 0, 0, 0)),
            ),
        ]
    )
    path.write_bytes(_chunk(b"RIFF", b"sfbk" + content))
    return path


class Told(NamedTuple):
    piece: Piece
    text: str

    @property
    def clauses(self) -> list[tuple[Part, str]]:
        """Each part with what is told of it."""
        text = self.text.rstrip(".")
        told = [text] if len(self.piece.parts) == 1 else re.split(" (?:while|and|as) ", text)
        return list(zip(self.piece.parts, told, strict=True))


@pytest.fixture(scope="module")
def instruments():
    return Instruments.from_yaml(TINY / "instruments.yaml")


@pytest.fixture(scope="module")
def composer(instruments):
    return Composer(instruments, read_sources(TINY / "questions.yaml"), BEATS)


@pytest.fixture(scope="module")
def told(composer):
    rng = random.Random(0)
    return [Told(piece, composer.tell(piece, rng)) for piece in (composer.draw(rng) for _ in range(4000))]


@pytest.fixture(scope="module")
def parts(told):
    return [part for piece, _ in told for part in piece.parts]


@pytest.fixture(scope="module")
def soundfont(tmp_path_factory):
    return write_soundfont(tmp_path_factory.mktemp("soundfont") / "sine.sf2")


@pytest.fixture
def synthesizer(soundfont):
    pytest.importorskip("tinysoundfont")
    return Synthesizer(soundfont, RATE)


def mean_key(part: Part) -> float:
    return float(np.mean([note.key for note in part.notes]))


def test_shipped_instruments_are_described_and_have_noun_phrases(instruments):
    described = yaml.safe_load((TINY / "descriptions.yaml").read_text(encoding="utf-8"))["descriptions"]
    asked = yaml.safe_load((TINY / "questions.yaml").read_text(encoding="utf-8"))
    labels = set(instruments.labels)
    assert len(labels) == len(instruments.labels) > 50
    assert labels <= set(described)
    assert labels <= set(asked["sources"])
    assert labels - set(asked["music"]) == NO_MUSIC_ALONE


def test_pieces_are_a_function_of_the_seed(composer):
    def draw(seed: int) -> list[Told]:
        rng = random.Random(seed)
        return [Told(piece, composer.tell(piece, rng)) for piece in (composer.draw(rng) for _ in range(50))]

    assert draw(1) == draw(1)
    assert not {piece for piece, _ in draw(1)} & {piece for piece, _ in draw(2)}


def test_every_instrument_and_every_form_is_drawn(instruments, told, parts):
    assert {part.label for part in parts} == set(instruments.labels)
    assert {part.form for part in parts} == set(FORMS)
    assert Counter(len(piece.parts) for piece, _ in told).keys() == {1, 2}
    for piece, _ in told:
        if len(piece.parts) == 2:
            assert piece.parts[0].form == "melody" and piece.parts[1].form in ("chords", "arpeggio", "beat")


def test_notes_lie_in_the_compass_and_in_the_bars(instruments, parts):
    for part in parts:
        if part.preset is not None:
            low, high = instruments.melodic[part.label].range
            assert part.preset in instruments.melodic[part.label].presets
            assert all(low <= note.key <= high for note in part.notes)
        elif part.form == "hits":
            assert len({note.key for note in part.notes}) == 1
            assert part.notes[0].key in instruments.percussion[part.label]
        assert all(0 <= note.start < BEATS and note.beats > 0 for note in part.notes)
        assert part.notes[0].start == 0
        assert all(1 <= note.velocity <= 127 for note in part.notes)
        # The last note of a melody may hang over.
        ends = [note.start + note.beats for note in part.notes]
        assert all(end <= BEATS for end in (ends[:-1] if part.form == "melody" else ends))


def test_parts_of_a_piece_are_in_one_key(told):
    scales = [{(tonic + step) % 12 for step in scale} for tonic in range(12) for scale in (MAJOR, MINOR)]
    for piece, _ in told:
        heard = {note.key % 12 for part in piece.parts if part.preset is not None for note in part.notes}
        assert any(heard <= scale for scale in scales)


def test_forms_are_what_they_are_called(instruments, parts):
    for part in parts:
        starts = sorted({note.start for note in part.notes})
        if part.form == "note":
            assert len({note.key for note in part.notes}) == 1
        if part.form == "melody":
            assert all(first.start + first.beats == second.start for first, second in pairwise(part.notes))
        if part.form == "chords":
            for start in starts:
                chord = sorted(note.key for note in part.notes if note.start == start)
                assert len(chord) == 3 and {upper - lower for lower, upper in pairwise(chord)} <= {3, 4}
        if part.form == "arpeggio":
            assert starts == [step / 2 for step in range(2 * BEATS)] and len(part.notes) == len(starts)
        if part.form == "beat":
            for label, first in (("kick drum", 0), ("snare drum", 1)):
                struck = {note.start for note in part.notes if note.key in instruments.percussion[label]}
                assert struck >= set(range(first, BEATS, 2))


def test_instruments_and_forms_are_told(composer, told):
    for one in told:
        for part, clause in one.clauses:
            named = re.search(rf"\b{composer.phrases[part.label]}\b", clause, re.IGNORECASE)
            assert named or (part.form == "beat" and re.search(r"\bdrums?\b", clause, re.IGNORECASE)), one.text
            forms = {form for form, words in TOLD_FORMS.items() if re.search(words, clause, re.IGNORECASE)}
            assert forms == {part.form}, one.text


def test_pace_and_register_are_true(told):
    found = Counter()
    for one in told:
        for part, clause in one.clauses:
            words = set(re.findall("[a-z]+", clause.lower())) & {"slow", "fast", "low", "high"}
            found.update(words)
            assert "slow" not in words or one.piece.tempo <= SLOW, one.text
            assert "fast" not in words or one.piece.tempo >= FAST, one.text
            assert not words & {"low", "high"} or part.preset is not None, one.text
            assert "low" not in words or mean_key(part) < LOW, one.text
            assert "high" not in words or mean_key(part) > HIGH, one.text
    assert len(found) == 4 and min(found.values()) > 50


def test_verbs_agree_with_the_number(composer, told):
    found = Counter()
    for one in told:
        for part, clause in one.clauses:
            if verb := re.search(rf"\b{composer.phrases[part.label]} (plays?|is|are)\b", clause, re.IGNORECASE):
                assert (verb[1] in ("play", "are")) == (part.label in PLURALS), one.text
                found[verb[1]] += 1
    assert found.keys() == {"play", "plays", "is", "are"}


def test_sentences_are_clean(told):
    for _, text in told:
        assert re.fullmatch(r"[A-Z][a-z]*([ -][a-z]+)*\.", text), text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"\ba register\b", text), text


def test_every_way_of_telling_is_used(told):
    """Up to the noun phrase and words for pace and register, which come and go."""
    said = {re.sub(r"\W+", "", text).lower() for _, text in told}
    for templates in FORMS.values():
        for template in templates:
            pieces = [re.sub(r"\W+", "", piece) for piece in re.split(r"\{\w+\}", template.lower())]
            assert any(re.fullmatch(".*?".join(pieces), text) for text in said), template


def test_composer_needs_a_noun_phrase_for_every_instrument(instruments):
    with pytest.raises(ValueError, match="No noun phrases for the instruments harp, tuba"):
        Composer(instruments, {label: f"a {label}" for label in instruments.labels if label not in ("tuba", "harp")})


@pytest.mark.parametrize(("presets", "keys"), [([], [40, 50]), ([0], [50, 50]), ([0], [50, 40]), ([0], [50, 128])])
def test_instruments_without_presets_or_compass_are_refused(presets, keys):
    with pytest.raises(ValueError, match="has presets and a range of MIDI keys"):
        Instrument(presets, keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"melodic": {}}, "no melodic instruments"),
        (
            {"percussion": {"kick drum": [36], "hi-hat": []}},
            "A beat needs keys of snare drum, hi-hat; percussion is .*36",
        ),
        ({"strings": {}}, "expected melodic, percussion and drum_kit"),
    ],
)
def test_other_files_than_of_instruments_are_refused(tmp_path, change, message):
    content = yaml.safe_load((TINY / "instruments.yaml").read_text(encoding="utf-8")) | change
    (tmp_path / "instruments.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Instruments.from_yaml(tmp_path / "instruments.yaml")


def part_of(*notes: Note, drums: bool = False) -> Part:
    return Part("drum kit" if drums else "organ", "melody", notes, None if drums else 0)


def pitch(waveform: np.ndarray) -> float:
    """The strongest frequency in Hz."""
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), 8 * len(waveform)))
    return float(spectrum.argmax() / (8 * len(waveform)) * RATE)


def test_a_piece_sounds_as_it_is_written(synthesizer):
    piece = Piece(60.0, (part_of(Note(0, 1, 69, 100), Note(2, 1, 57, 100)),))
    waveform = synthesizer.render(piece, 4 * RATE)
    assert waveform.shape == (4 * RATE,) and waveform.dtype == np.float32
    assert np.abs(waveform).max() == pytest.approx(0.5, rel=1e-6)
    seconds = np.split(waveform, 4)
    assert pitch(seconds[0]) == pytest.approx(440, abs=1)
    assert pitch(seconds[2]) == pytest.approx(220, abs=1)
    assert seconds[0].std() > 0.2 and seconds[2].std() > 0.2
    # A note ends a twentieth before its time, and fades within 20 ms; then there is nothing.
    for rest in (seconds[1], seconds[3], seconds[0][int(0.97 * RATE) :]):
        assert not rest.any()


def test_tempo_sets_the_time_of_a_note(synthesizer):
    for tempo, start in ((60.0, 2 * RATE), (120.0, RATE), (100.0, round(1.2 * RATE))):
        waveform = Synthesizer(synthesizer.soundfont, RATE).render(Piece(tempo, (part_of(Note(2, 1, 69, 90)),)), 20000)
        assert start <= np.flatnonzero(waveform)[0] <= start + 2


def test_drums_come_from_the_bank_of_drums(synthesizer):
    waveform = synthesizer.render(Piece(60.0, (part_of(Note(0, 1, 57, 100), drums=True),)), RATE)
    assert pitch(waveform) == pytest.approx(440, abs=1)  # an octave above the key, as the soundfont has it


def test_parts_sound_together(synthesizer):
    parts = (part_of(Note(0, 4, 57, 100)), part_of(Note(0, 4, 57, 100), drums=True))
    spectrum = np.abs(np.fft.rfft(synthesizer.render(Piece(60.0, parts), RATE)))
    assert set(spectrum.argsort()[-2:].tolist()) == {220, 440}


def test_soft_pieces_are_as_loud_as_others_and_long_ones_are_cut(synthesizer):
    loud, soft = (Piece(60.0, (part_of(Note(0, 8, 69, velocity)),)) for velocity in (127, 20))
    assert len(synthesizer.render(loud, 1000)) == 1000
    for piece in (loud, soft):
        rendered = Synthesizer(synthesizer.soundfont, RATE).render(piece, RATE)
        assert np.abs(rendered).max() == pytest.approx(0.5, rel=1e-6)


def test_other_sampling_rates_keep_the_pitch(synthesizer):
    piece = Piece(60.0, (part_of(Note(0, 1, 69, 100)),))
    waveform = Synthesizer(synthesizer.soundfont, 16000).render(piece, 16000)
    assert pitch(waveform) == pytest.approx(220, abs=1)  # at half the rate that `pitch` takes for granted


def sustained(key: int) -> Piece:
    """It sounds to the end of what is rendered and beyond."""
    return Piece(60.0, (part_of(Note(0, 8, key, 100)),))


def test_two_synthesizers_render_the_same_bits(synthesizer):
    first = synthesizer.render(sustained(69), RATE)
    assert np.array_equal(Synthesizer(synthesizer.soundfont, RATE).render(sustained(69), RATE), first)
    # What has rendered holds a loaded soundfont, which stays behind.
    assert np.array_equal(pickle.loads(pickle.dumps(synthesizer)).render(sustained(69), RATE), first)


def test_a_piece_is_the_same_after_another(synthesizer):
    first = synthesizer.render(sustained(69), RATE)
    synthesizer.render(sustained(57), RATE)
    assert np.array_equal(synthesizer.render(sustained(69), RATE), first)


def test_a_missing_soundfont_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such soundfont: .*none\.sf2"):
        Synthesizer(tmp_path / "none.sf2", RATE)


def test_another_file_than_a_soundfont_is_an_error(tmp_path):
    (tmp_path / "a.sf2").write_bytes(b"RIFF\x24\0\0\0WAVEfmt ")
    with pytest.raises(ValueError, match="is no soundfont: it begins with b'RIFF"):
        Synthesizer(tmp_path / "a.sf2", RATE)


def test_without_tinysoundfont_the_error_says_how_to_install_it(soundfont, monkeypatch):
    monkeypatch.setitem(sys.modules, "tinysoundfont", None)  # as if it were not installed
    with pytest.raises(ImportError, match="pip install --no-deps tinysoundfont"):
        Synthesizer(soundfont, RATE)


def test_a_soundfont_without_the_presets_is_an_error(synthesizer, instruments):
    drums = {label: instruments.percussion[label] for label in ("kick drum", "snare drum", "hi-hat")}
    synthesizer.check(Instruments({"organ": Instrument([0], [40, 80])}, drums, "drum kit"))
    with pytest.raises(ValueError, match=r"sine\.sf2 lacks the presets of piano \[1, 2\], electric piano \[4, 5\]"):
        synthesizer.check(instruments)
