"""Installed for real, in environments of their own. Minutes long: `make test-slow`."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import MATS_TINY, ROOT, SOUNDS

pytestmark = pytest.mark.slow

ROOSTER = SOUNDS / "rooster.ogg"


def make_environment(folder: Path) -> Path:
    """A new virtual environment with torch; returns its `bin`."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0"], check=True)
    return folder / "bin"


def run(command: list, cwd: Path) -> str:
    """Runs a command far from the repository and offline; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf")}
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def expected():
    """What the bundled model says here."""
    from transformers import pipeline

    pipe = pipeline("audio-text-to-text", model=str(MATS_TINY), trust_remote_code=True)
    return pipe(str(ROOSTER), text="What is making this sound?")["generated_text"]


@pytest.mark.timeout(1200)
def test_a_wheel_works_outside_of_the_repository(tmp_path, expected):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("mats-*.whl")
    binaries = make_environment(tmp_path / "venv")
    constrained = [binaries / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*constrained, wheel], check=True)
    printed = run([binaries / "mats", "ask", ROOSTER, "What is making this sound?", "--json"], tmp_path)
    assert json.loads(printed)["answer"] == expected


@pytest.mark.timeout(1200)
def test_the_bundled_repo_needs_its_requirements_and_nothing_else(tmp_path, expected):
    binaries = make_environment(tmp_path / "venv")
    constrained = [binaries / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*constrained, "--requirement", MATS_TINY / "requirements.txt"], check=True)
    script = (
        "import sys; from transformers import pipeline; "
        "pipe = pipeline('audio-text-to-text', model=sys.argv[1], trust_remote_code=True); "
        "print(pipe(sys.argv[2], text='What is making this sound?')['generated_text'])"
    )
    assert run([binaries / "python", "-c", script, MATS_TINY, ROOSTER], tmp_path).strip() == expected
