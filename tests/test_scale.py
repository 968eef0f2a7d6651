"""Millions of rows: read, embedded in part and trained on in memory that does not grow with them."""

import json
import os
import subprocess
import sys

import pytest
from run_parts import ADAPTED, arguments, write_parts, write_recipe

# Runs `mats train` and prints the peak of the memory that is its own: the files that it maps are not.
MEASURED = """
import json, re, sys, threading
from training import train_mats

peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.05):
        found = re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())
        peak = max(peak, int(found.group(1)))

watcher = threading.Thread(target=watch)
watcher.start()
train_mats.main(sys.argv[1:])
done.set()
watcher.join()
print(json.dumps({"peak_mb": peak // 1024}))
"""


def peak_of_a_run(parts, folder, rows: int) -> int:
    """Megabytes at most, for a mixture of so many generated rows, a slice of which is embedded and trained on."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    with (texts / "rows.csv").open("w") as file:
        file.write("caption,question,reply\n")
        for number in range(rows):
            file.write(f"Sound {number} is heard near a house.,What is sound {number}?,It is number {number}.\n")
    columns = {"description": "caption", "instruction": "question", "answer": "reply"}
    mixture = {"sources": [{"reader": "csv", "path": "rows.csv", "columns": columns}]}
    fields = {"language_model": str(parts / "language-model"), **ADAPTED, "mixture": mixture, "save_steps": 1000}
    recipe = write_recipe(folder, "many", **{**fields, "max_steps": 100, "max_examples": 4000})
    command = arguments(parts, recipe, folder / "out", "--data_dir", str(texts))
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    record = json.loads((folder / "out" / "training_record.json").read_text())
    assert record["rows"]["seen"] == 400
    assert record["data"]["rows"] == rows
    assert "4000 rows, 4000 different embeddings, 4000 newly encoded" in result.stderr
    (texts / "rows.csv").unlink()
    return json.loads(result.stdout.strip().splitlines()[-1])["peak_mb"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_five_million_rows_take_no_more_memory_than_fifty_thousand(tmp_path):
    parts = write_parts(tmp_path)
    few = peak_of_a_run(parts, tmp_path / "few", 50_000)
    many = peak_of_a_run(parts, tmp_path / "many", 5_000_000)
    print(f"peak of anonymous memory: {few} MB for 50,000 rows, {many} MB for 5,000,000")
    assert many < few + 150
