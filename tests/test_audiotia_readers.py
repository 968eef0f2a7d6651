"""Each data set in its official format becomes the examples that the paper's templates ask for; made-up rows."""

import json
from pathlib import Path

import pytest
import yaml

from training.audiotia.card import DataCard
from training.audiotia.mixture import Mixture
from training.audiotia.readers import READERS

CAPTION, MUSIC_CAPTION = "Generate audio caption.", "Generate music caption."
CLASSIFY = "Classify events in the audio clip."


@pytest.fixture
def read(tmp_path):
    """Reads one source whose files are given by content; returns examples, and the source's card."""

    def read(reader, files, **options):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        mixture = Mixture.load({"sources": [{"reader": reader, **options}]}, tmp_path)
        mixture.check(tmp_path)
        card = DataCard()
        examples = list(mixture.examples(tmp_path, card=card))
        assert all(example.source == reader for example in examples)
        return examples, card.sources[0]

    return read


def described(*labels):
    """Lines of a file of descriptions; each argument is a combination."""
    combinations = [[label] if isinstance(label, str) else list(label) for label in labels]
    return "".join(
        json.dumps({"labels": c, "description": f"Sounds of {' and '.join(c)}."}) + "\n" for c in combinations
    )


# Captions

CAPTION_FILES = {
    "audiocaps": (
        "audiocap_id,youtube_id,start_time,caption\n1,rZ4d8p0hAfI,30, A dog barks \n2,aaaaaaaaaaa,0,\n",
        [("A dog barks", "rZ4d8p0hAfI_30.wav")],
    ),
    "clotho": (
        "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\nA b.wav,One,Two,Three,Four,Five\n",
        [(text, "A b.wav") for text in ("One", "Two", "Three", "Four", "Five")],
    ),
    "wavcaps": (
        {"num_captions_per_audio": 1, "data": [{"id": "77", "caption": "Wind blows.", "duration": 3.5, "audio": ""}]},
        [("Wind blows.", "77")],
    ),
    "macs": (
        yaml.safe_dump(
            {
                "files": [
                    {
                        "filename": "park-1.wav",
                        "annotations": [
                            {"annotator_id": 1, "sentence": "birds sing", "tags": ["birds_singing"]},
                            {"annotator_id": 2, "sentence": "a child shouts", "tags": ["children_voices"]},
                        ],
                    }
                ]
            }
        ),
        [("birds sing", "park-1.wav"), ("a child shouts", "park-1.wav")],
    ),
    "musiccaps": (
        "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval\n"
        "rZ4d8p0hAfI,30,40,/m/04rlf,\"['a']\",A slow ballad.,4,False,True\n",
        [("A slow ballad.", "rZ4d8p0hAfI_30_40.wav")],
    ),
    "song_describer": (
        "caption_id,track_id,caption,is_valid_subset,familiarity,artist_id,album_id,path,duration\n"
        "1,2,Fast drums,True,0,3,4,00/100.mp3,120.0\n",
        [("Fast drums", "00/100.mp3")],
    ),
}
SUFFIXES = {"wavcaps": ".json", "macs": ".yaml"}


@pytest.mark.parametrize("reader", CAPTION_FILES)
def test_captions(read, reader):
    content, expected = CAPTION_FILES[reader]
    name = "f" + SUFFIXES.get(reader, ".csv")
    examples, card = read(reader, {name: content}, path=name)
    music = reader in ("musiccaps", "song_describer")
    assert [(e.description, e.audio) for e in examples] == expected
    for example in examples:
        assert example.turns == ((MUSIC_CAPTION if music else CAPTION, example.description),)
        assert (example.task, example.audio_type) == ("CAP", "music" if music else "sound")
    assert card.incomplete == (reader == "audiocaps")


@pytest.mark.parametrize("reader", CAPTION_FILES)
def test_captions_of_another_format_are_told(read, reader):
    name = "f" + SUFFIXES.get(reader, ".csv")
    content = {".csv": "x,y\n1,2\n", ".json": [{"x": 1}], ".yaml": "files: [{x: 1}]"}[Path(name).suffix]
    with pytest.raises(ValueError, match=rf"{name} has the columns 'x'.*; expected .*; missing: "):
        read(reader, {name: content}, path=name)


def test_macs_without_files_is_told(read):
    with pytest.raises(ValueError, match=r"has \['clips'\] at its top, expected the key 'files'"):
        read("macs", {"f.yaml": "clips: []"}, path="f.yaml")


def test_rows_are_selected_by_columns(read):
    text = CAPTION_FILES["musiccaps"][0] + "aaaaaaaaaaa,1,2,/m/0,[],Drums.,4,False,False\n"
    examples, card = read("musiccaps", {"f.csv": text}, path="f.csv", where={"is_audioset_eval": False})
    assert [e.description for e in examples] == ["Drums."]
    assert (card.read, card.not_selected, card.taken) == (2, 1, 1)
    with pytest.raises(ValueError, match="missing: 'split'"):
        read("musiccaps", {}, path="f.csv", where={"split": "train"})


def test_the_clip_is_named_by_a_pattern(read):
    content = CAPTION_FILES["audiocaps"][0]
    examples, _ = read("audiocaps", {"f.csv": content}, path="f.csv", audio="Y{youtube_id}.flac")
    assert examples[0].audio == "YrZ4d8p0hAfI.flac"
    with pytest.raises(ValueError, match=r"columns 'audiocap_id', .* the audio pattern .*{ytid}.* expects 'ytid'"):
        read("audiocaps", {}, path="f.csv", audio="{ytid}.flac")


# Questions

OPENAQA = [
    {
        "instruction": "What barks?",
        "input": "",
        "audio_id": "/data/audio/rZ4d8p0hAfI.flac",
        "dataset": "as_strong_train",
        "task": "open-ended question",
        "output": "A dog.",
    },
    {"instruction": "Why?", "audio_id": "own.flac", "task": "other", "output": "So.", "caption": "Its own caption"},
    {"instruction": "What?", "audio_id": "unknown.flac", "task": "other", "output": "It is."},
    {"instruction": "Empty?", "audio_id": "unknown.flac", "task": "other", "output": " "},
]
CAPTIONS = "audiocap_id,youtube_id,start_time,caption\n1,rZ4d8p0hAfI,30,A dog barks\n"


def test_openaqa_replaces_sounds_by_captions(read):
    examples, card = read("openaqa", {"f.json": OPENAQA, "c.csv": CAPTIONS}, path="f.json", captions="c.csv")
    assert [(e.description, e.instruction, e.answer, e.audio) for e in examples] == [
        ("A dog barks", "What barks?", "A dog.", "rZ4d8p0hAfI.flac"),
        ("Its own caption", "Why?", "So.", "own.flac"),
    ]
    assert {(e.task, e.audio_type) for e in examples} == {("AQA", "sound")}
    assert (card.read, card.without_description, card.incomplete, card.taken) == (4, 1, 1, 2)


def test_openaqa_without_captions_is_told(read):
    with pytest.raises(ValueError, match=r"needs the option captions: .*f.json has no captions"):
        read("openaqa", {"f.json": OPENAQA}, path="f.json")
    with pytest.raises(ValueError, match=r"has the columns 'caption', 'x'; expected 'audio_id', .*missing: .*'output'"):
        read("openaqa", {"g.json": [{"caption": "c", "x": 1}]}, path="g.json")


def test_openaqa_labels_and_captions_of_music(read):
    records = [
        {"instruction": "Label it", "audio_id": "a.flac", "task": "cla_label", "output": "Labels: Music; Guitar"},
        {"instruction": "Label it", "audio_id": "b.flac", "task": "cla_label", "output": "Labels: Musicality"},
        {"instruction": "Caption it", "audio_id": "a.flac", "task": "caption", "output": "Loud music plays."},
    ]
    files = {"f.json": records}
    music = {"path": "f.json", "audio_type": "music", "about": ["music"]}
    examples, card = read("openaqa", files, **music, task="CLS", where={"task": "cla_label"}, captions="f.json")
    assert [(e.description, *e.turns[0], e.task) for e in examples] == [
        ("Loud music plays.", CLASSIFY, "Music, Guitar", "CLS")
    ]
    assert card.not_selected == 2
    examples, _ = read("openaqa", files, **music, task="CAP", where={"task": ["caption"]})
    assert [(e.description, *e.turns[0], e.audio_type) for e in examples] == [
        ("Loud music plays.", MUSIC_CAPTION, "Loud music plays.", "music")
    ]


def test_musicqa_conversations(read):
    def record(name, *texts):
        speakers = ["human", "gpt"] * (len(texts) // 2)
        talk = [{"from": s, "value": t} for s, t in zip(speakers, texts, strict=True)]
        return {"audio_name": name, "conversation": talk}

    records = [record("1.wav", "What is it?", "Rock.", "Fast?", "Yes."), record("2.wav", "What?", "Jazz.")]
    files = {"f.json": records, "c.json": {"1.wav": "Loud rock."}}
    (example,), card = read("musicqa", files, path="f.json", captions="c.json")
    assert example.turns == (("What is it?", "Rock."), ("Fast?", "Yes."))
    assert (example.description, example.task, example.audio_type) == ("Loud rock.", "AQA", "music")
    assert card.without_description == 1
    records[0]["conversation"].pop()
    with pytest.raises(ValueError, match=r"about 1.wav speak \['human', 'gpt', 'human'\], expected human and gpt"):
        read("musicqa", files, path="f.json", captions="c.json")


def test_clothoaqa_each_answer_or_the_majority(read):
    questions = "file_name,QuestionText,answer\n" + "".join(
        f"rain.wav,{question},{answer}\n"
        for question, answers in {"Is it wet?": ["no", "yes", "Yes "], "Where?": ["roof", "street", "park"]}.items()
        for answer in answers
    )
    files = {"q.csv": questions, "c.csv": "file_name,caption_1,caption_2\nrain.wav,Rain falls,It rains\n"}
    examples, _ = read("clothoaqa", files, path="q.csv", captions="c.csv")
    assert [e.answer for e in examples] == ["no", "yes", "Yes", "roof", "street", "park"]
    assert {e.description for e in examples} <= {"Rain falls", "It rains"}
    examples, _ = read("clothoaqa", files, path="q.csv", captions="c.csv", answers="majority")
    assert [(e.instruction, e.answer) for e in examples] == [("Is it wet?", "yes"), ("Where?", "roof")]
    with pytest.raises(ValueError, match="answers is 'most', expected each or majority"):
        read("clothoaqa", files, path="q.csv", captions="c.csv", answers="most")


# Labels

ONTOLOGY = 'index,mid,display_name\n0,/m/09x0r,Speech\n1,/m/032s66,"Gunshot, gunfire"\n'
AUDIOSET = (
    "# Segments csv created Sun Mar  5 10:54:25 2017\n"
    "# num_ytids=2, num_segs=2, num_unique_labels=2, num_positive_labels=3\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
    '--4gqARaEJE, 0.000, 10.000, "/m/09x0r,/m/032s66"\n'
    'aaaaaaaaaaa, 5.000, 15.000, "/m/09x0r"\n'
)
# reader: files, options, labels and name of each clip, audio type
LABEL_FILES = {
    "audioset": (
        {"f.csv": AUDIOSET, "o.csv": ONTOLOGY},
        {"path": "f.csv", "ontology": "o.csv"},
        [("--4gqARaEJE.wav", ("Speech", "Gunshot, gunfire")), ("aaaaaaaaaaa.wav", ("Speech",))],
        "sound",
    ),
    "fsd50k": (
        {"f.csv": 'fname,labels,mids\n64760,"Gunshot_and_gunfire,Speech","/m/032s66,/m/09x0r"\n', "o.csv": ONTOLOGY},
        {"path": "f.csv", "ontology": "o.csv"},
        [("64760.wav", ("Gunshot, gunfire", "Speech"))],
        "sound",
    ),
    "vggsound": (
        {"f.csv": '--4gqARaEJE,0,"people eating, noisily",train\naaaaaaaaaaa,30,dog barking,test\n'},
        {"path": "f.csv", "where": {"split": "train"}},
        [("--4gqARaEJE_000000.wav", ("people eating, noisily",))],
        "sound",
    ),
    "urbansound8k": (
        {
            "f.csv": "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
            "1-3-0-0.wav,1,0.0,0.3,1,5,3,dog_bark\n2-3-0-0.wav,2,0.0,0.3,1,6,8,siren\n"
        },
        {"path": "f.csv", "where": {"fold": [5, 7]}},
        [("fold5/1-3-0-0.wav", ("dog bark",))],
        "sound",
    ),
    "esc50": (
        {"f.csv": "filename,fold,target,category,esc10,src_file,take\n1-1-A-0.wav,1,20,crying_baby,True,1,A\n"},
        {"path": "f.csv"},
        [("1-1-A-0.wav", ("crying baby",))],
        "sound",
    ),
    "dcase17": (
        {
            "f.csv": "-5QrBL6MzLg_60.000_70.000.wav\t60.000\t70.000\tTrain horn\n"
            "b_QrBL6MzLg_0.000_10.000.wav\t0.000\t10.000\tAir horn, truck horn\n"
            "-5QrBL6MzLg_60.000_70.000.wav\t60.000\t70.000\tTrain\n"
        },
        {"path": "f.csv"},
        [
            ("Y-5QrBL6MzLg_60.000_70.000.wav", ("Train horn", "Train")),
            ("Yb_QrBL6MzLg_0.000_10.000.wav", ("Air horn, truck horn",)),
        ],
        "sound",
    ),
    "tut2017": (
        {"f.txt": "audio/b020_90_100.wav\tforest_path\tb020\naudio/b021_0_10.wav\tcafe/restaurant\tb021\n"},
        {"path": "f.txt"},
        [("audio/b020_90_100.wav", ("forest path",)), ("audio/b021_0_10.wav", ("cafe/restaurant",))],
        "sound",
    ),
    "sesa": ({"s/gunshot_001.wav": ""}, {"path": "s/*.wav"}, [("gunshot_001.wav", ("gunshot",))], "sound"),
    "vocalsound": (
        {"f.json": {"data": [{"wav": "/d/f0003_0_throatclearing.wav", "labels": "/m/0dl9sf8"}]}},
        {"path": "f.json"},
        [("f0003_0_throatclearing.wav", ("throat clearing",))],
        "sound",
    ),
    "crema_d": (
        {"f.csv": '"Stimulus_Number","Filename"\n1,"1001_DFA_ANG_XX"\n2,"1001_IEO_NEU_LO"\n'},
        {"path": "f.csv"},
        [("1001_DFA_ANG_XX", ("anger",)), ("1001_IEO_NEU_LO", ("neutral",))],
        "speech",
    ),
    "ravdess": (
        {"f.txt": "Actor_12/03-01-06-01-02-01-12.wav\n"},
        {"path": "f.txt", "audio": "{folder}/{audio}"},
        [("Actor_12/03-01-06-01-02-01-12.wav", ("fearful",))],
        "speech",
    ),
    "gtzan": ({"f.txt": "blues/blues.00001.wav\n"}, {"path": "f.txt"}, [("blues.00001.wav", ("blues",))], "music"),
    "beijing_opera": (
        {"f.txt": "222132__ajaysm__bangu-01.wav\n"},
        {"path": "f.txt"},
        [("222132__ajaysm__bangu-01.wav", ("bangu",))],
        "music",
    ),
}


@pytest.mark.parametrize("reader", LABEL_FILES)
def test_labels_of_clips(read, reader):
    files, options, expected, audio_type = LABEL_FILES[reader]
    texts = described(*(labels for _, labels in expected))
    examples, card = read(reader, {**files, "d.jsonl": texts}, descriptions="d.jsonl", **options)
    assert [(e.audio, tuple(e.answer.split(", "))) for e in examples] == [
        (clip, tuple(", ".join(labels).split(", "))) for clip, labels in expected
    ]
    for example, (_, labels) in zip(examples, expected, strict=True):
        assert example.instruction == CLASSIFY
        assert example.description == f"Sounds of {' and '.join(labels)}."
        assert (example.task, example.audio_type) == ("CLS", audio_type)
    assert card.taken == len(expected)


@pytest.mark.parametrize("reader", LABEL_FILES)
def test_clips_without_a_description_are_counted(read, reader):
    files, options, expected, _ = LABEL_FILES[reader]
    files = {**files, "d.jsonl": described("something else")}
    examples, card = read(reader, files, descriptions="d.jsonl", **options)
    assert examples == []
    assert card.without_description == len(expected)


@pytest.mark.parametrize("reader", LABEL_FILES)
def test_a_list_of_labels_gives_each_of_its_descriptions(read, reader):
    texts = described("Dog", "dog", "dog", ("rain", "Dog"), "cat", ("Dog", "wolf"))
    files = {"l.json": {"rain": 1, "Dog": 0, "wind": 2}, "d.jsonl": texts}
    examples, card = read(reader, files, labels="l.json", descriptions="d.jsonl")
    assert [(e.description, e.answer, e.audio) for e in examples] == [
        ("Sounds of Dog.", "Dog", None),
        ("Sounds of dog.", "Dog", None),
        ("Sounds of rain and Dog.", "Dog, rain", None),
    ]
    assert card.without_description == 1  # wind


def test_label_lists_of_all_kinds(read):
    for name, content in {"l.json": ["dog", "cat"], "m.json": {"cat": 1, "dog": 0}, "l.txt": "dog\n\ncat\n"}.items():
        examples, _ = read(
            "esc50", {name: content, "d.jsonl": described("cat", "dog")}, labels=name, descriptions="d.jsonl"
        )
        assert [e.answer for e in examples] == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"neither {label: index} nor a list"):
        read("esc50", {"l.json": [1]}, labels="l.json", descriptions="d.jsonl")


def test_several_descriptions_take_turns(read):
    lines = "".join(json.dumps({"labels": ["siren"], "description": text}) + "\n" for text in ("One.", "Two."))
    rows = "".join(f"siren_{n:03}.wav\n" for n in range(5))
    examples, _ = read("sesa", {"f.txt": rows, "d.jsonl": lines}, path="f.txt", descriptions="d.jsonl")
    assert [e.description for e in examples] == ["One.", "Two.", "One.", "Two.", "One."]


def test_fsd50k_names_labels_without_an_ontology(read):
    files = {"f.csv": LABEL_FILES["fsd50k"][0]["f.csv"], "d.jsonl": described(("Gunshot_and_gunfire", "Speech"))}
    examples, _ = read("fsd50k", files, path="f.csv", descriptions="d.jsonl")
    assert examples[0].answer == "Gunshot and gunfire, Speech"
    ontology = [{"id": "/m/032s66", "name": "Gunshot, gunfire"}, {"id": "/m/09x0r", "name": "Speech"}]
    files |= {"o.json": ontology, "d.jsonl": described(("Speech", "Gunshot, gunfire"))}
    examples, _ = read("fsd50k", files, path="f.csv", descriptions="d.jsonl", ontology="o.json")
    assert examples[0].answer == "Gunshot, gunfire, Speech"


def test_tut2017_evaluation_set_has_two_columns(read):
    files = {"f.txt": "audio/1.wav\tbeach\n", "d.jsonl": described("beach")}
    examples, _ = read("tut2017", files, path="f.txt", descriptions="d.jsonl")
    assert (examples[0].audio, examples[0].answer) == ("audio/1.wav", "beach")


@pytest.mark.parametrize(
    ("reader", "files", "options", "message"),
    [
        ("esc50", {}, {}, "has neither of path .* and labels"),
        ("esc50", {"f.csv": "", "l.json": {}}, {"path": "f.csv", "labels": "l.json"}, "has both of path"),
        ("esc50", {"l.json": {"dog": 0}}, {"labels": "l.json"}, "lacks the option descriptions"),
        ("esc50", {"f.csv": "a\n1\n"}, {"path": "f.csv"}, "'a'; expected 'category', 'filename'"),
        ("audioset", {"f.csv": AUDIOSET}, {"path": "f.csv"}, "lacks the option ontology"),
        (
            "audioset",
            {"f.csv": AUDIOSET, "o.csv": "index,mid,display_name\n0,/m/0,Dog\n"},
            {"path": "f.csv", "ontology": "o.csv"},
            "has the label '/m/09x0r', which .*o.csv does not name",
        ),
        (
            "audioset",
            {"f.csv": "a, b\n", "o.csv": ONTOLOGY},
            {"path": "f.csv", "ontology": "o.csv"},
            "line 1: expected",
        ),
        ("dcase17", {"f.csv": "a,b\n"}, {"path": "f.csv"}, "line 1, has 1 fields, expected 4"),
        ("gtzan", {"f.txt": "song.wav\n"}, {"path": "f.txt"}, "'song.wav' has no label .* names as blues.00001.wav"),
        ("crema_d", {"f.txt": "1001_DFA_XXX_XX.wav\n"}, {"path": "f.txt"}, "names as 1001_DFA_ANG_XX.wav"),
        ("gtzan", {"s/a.txt": ""}, {"path": "s"}, "is a folder, expected its sounds"),
        ("sesa", {"d.jsonl": '{"labels": [], "description": ""}', "f.txt": "siren_1\n"}, {"path": "f.txt"}, None),
    ],
)
def test_metadata_of_another_format_is_told(read, reader, files, options, message):
    if "d.jsonl" in files:
        options = {**options, "descriptions": "d.jsonl"}
        message = r"has labels \[\], expected a list of at least one label"
    with pytest.raises(ValueError, match=message):
        read(reader, files, **options)


# Tables of anyone's


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_tables_of_ones_own(read, suffix):
    record = {"description": "A bell.", "instruction": "What rings?", "answer": "A bell", "audio": "bell.wav"}
    content = {
        ".csv": "\n".join([",".join(record), ",".join(record.values())]) + "\n",
        ".tsv": "\n".join(["\t".join(record), "\t".join(record.values())]) + "\n",
        ".json": [record],
        ".jsonl": json.dumps(record),
    }[suffix]
    (example,), _ = read("csv", {"f" + suffix: content}, path="f" + suffix, audio_type="music")
    assert (example.description, *example.turns[0]) == ("A bell.", "What rings?", "A bell")
    assert (example.task, example.audio_type, example.audio) == ("AQA", "music", "bell.wav")


def test_columns_of_ones_own_names(read):
    text = "heard,asked,told,file\nA bell.,What rings?,A bell,b\n,What?,It,c\nA dog.,,It,c\n"
    columns = {"description": "heard", "instruction": "asked", "answer": "told"}
    (example,), card = read("csv", {"f.csv": text}, path="f.csv", columns=columns, audio="{file}.wav", task="mine")
    assert (example.task, example.audio) == ("mine", "b.wav")
    assert (card.read, card.without_description, card.incomplete) == (3, 1, 1)
    (example, *_), _ = read("csv", {"f.csv": text}, path="f.csv", columns={"caption": "heard"})
    assert (example.description, *example.turns[0], example.task) == ("A bell.", CAPTION, "A bell.", "CAP")
    with pytest.raises(ValueError, match="'heard', 'asked', 'told', 'file'; expected 'description', 'instruction'"):
        read("csv", {"f.csv": text}, path="f.csv")
    with pytest.raises(ValueError, match="expected columns by role"):
        read("csv", {"f.csv": text}, path="f.csv", columns={"question": "asked"})


def test_all_readers_are_tested():
    questions = {"openaqa", "musicqa", "clothoaqa"}
    assert set(READERS) == {*CAPTION_FILES, *questions, *LABEL_FILES, "csv", "drawn"}
