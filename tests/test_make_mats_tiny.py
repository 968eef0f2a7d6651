"""Putting the bundled model together: the parts must be of one CLAP."""

import json

import pytest
from conftest import make_clap

from hub_cards.make_mats_tiny import gather


@pytest.fixture
def parts(tmp_path):
    clap, mats = tmp_path / "clap", tmp_path / "mats"
    encoder = make_clap()
    encoder.save_pretrained(clap)
    (clap / "training_log.json").write_text("{}")
    (clap / "credits.csv").write_text("file_name,label,licence,source\n")
    (mats / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (mats / "inputs.json").write_text("{}")
    (mats / "training_record.json").write_text(json.dumps({"clap_fingerprint": encoder.fingerprint}))
    return clap, mats


def test_records_and_licence_go_along_and_the_trainers_states_stay(parts, tmp_path):
    checkpoint = gather(*parts, tmp_path / "checkpoint")
    assert {path.name for path in checkpoint.iterdir()} == {
        "LICENSE",
        "clap_record.json",
        "credits.csv",
        "training_record.json",
    }


def test_another_clap_than_it_was_trained_with_is_refused(parts, tmp_path):
    clap, mats = parts
    make_clap(seed=1).save_pretrained(clap)
    with pytest.raises(ValueError, match=r"was trained with the CLAP .* remove .*mats to train it anew"):
        gather(clap, mats, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
