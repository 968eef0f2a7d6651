"""A whole `mats train` on a small scale: a CLAP, a language model, caption files and recipes, in a folder."""

import csv
from pathlib import Path

import yaml
from conftest import SENTENCES, make_chat_tokenizer, make_clap, make_model

MIXTURE = {
    "sources": [
        {"reader": "audiocaps", "path": "audiocaps.csv", "licence": "CC0"},
        {"reader": "clotho", "path": "clotho.csv", "licence": "CC0"},
    ]
}
MAPPER = {
    "num_audio_tokens": 4,
    "mapper_clap_tokens": 3,
    "mapper_hidden_size": 32,
    "mapper_num_layers": 1,
    "mapper_num_heads": 4,
    "mapper_intermediate_size": 64,
}
RUN = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "held_out": 5,
    "memory_size": 20,
    "memory_clusters": 3,
    "seed": 0,
    "use_cpu": True,
    "disable_tqdm": True,
}
# A new language model, trained whole, as mats-tiny's.
NEW = {
    "text_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    "new_vocab_size": 320,
    "train_language_model": True,
    "lora_r": 0,
}
# A pretrained one with adapters, as mats-smol's.
ADAPTED = {"lora_r": 2, "lora_alpha": 8, "checkpoint": "light"}


def write_parts(folder: Path) -> Path:
    """Writes everything but the recipes."""
    make_clap().save_pretrained(folder / "clap")
    language_model = make_model("llama").language_model
    language_model.save_pretrained(folder / "language-model")
    make_chat_tokenizer().save_pretrained(folder / "language-model")
    texts = folder / "texts"
    texts.mkdir()
    with (texts / "audiocaps.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audiocap_id", "youtube_id", "start_time", "caption"])
        writer.writerows([number, f"video{number}", 30, text] for number, text in enumerate(SENTENCES))
    with (texts / "clotho.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", *(f"caption_{number}" for number in range(1, 6))])
        for number in range(8):
            writer.writerow([f"clip {number}.wav", *(f"Sound {number} is heard {n} times." for n in range(1, 6))])
    return folder


def write_recipe(folder: Path, name: str, **fields) -> Path:
    """A recipe that `mats train` takes, with the mixture beside it."""
    (folder / "mixture.yaml").write_text(yaml.safe_dump(MIXTURE))
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"mixture": "mixture.yaml", **MAPPER, **RUN, **fields}))
    return path


def arguments(folder: Path, recipe: Path, output_dir: Path, *more: str) -> list[str]:
    """The command line after `mats train`."""
    where = ["--clap", str(folder / "clap"), "--data_dir", str(folder / "texts"), "--output_dir", str(output_dir)]
    return [str(recipe), *where, *more]
