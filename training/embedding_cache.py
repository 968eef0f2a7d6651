"""CLAP's embeddings, computed once: CLAP is frozen, so no training step needs it.

A cache is a folder of Arrow files, one for each part that was encoded. It belongs to one CLAP and is keyed by content
(a text, or the bytes of a clip), so that another mixture, a broken-off run or a second process find what was encoded
before. Several ranks may write at once: each encodes its share, and every part is a file that appears whole or not at
all.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

FORMAT_VERSION = 1
DESCRIPTION_FILE = "cache.json"
KEY_BYTES = 16
# Encoded before a part is written: what a stop can lose, and some 32 MB on disk at CLAP 2023's width.
ITEMS_IN_PART = 8192


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is; one of one by default."""

    index: int = 0
    count: int = 1

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()


def content_keys(contents: Sequence[str | bytes]) -> np.ndarray:
    """Keys of texts or bytes: `(len(contents),)` of 16-byte strings (BLAKE2b)."""
    digests = (
        hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=KEY_BYTES).digest()
        for content in contents
    )
    return np.frombuffer(b"".join(digests), dtype=f"V{KEY_BYTES}")


class EmbeddingCache:
    """Embeddings by content key, memory-mapped.

    Args:
        folder (`Path`): made if it is not there; a subfolder is named by the fingerprint, so that
            caches of several CLAPs lie side by side.
        clap_fingerprint (`str`): identity of the CLAP; see [`ClapEncoder.fingerprint`].
        embed_dim (`int`): width of the embeddings.
        kind (`str`): `"text"` or `"audio"`, with all that decides what an embedding of the same content is.
        dtype (`str`): `"float32"` or `"float16"`, as stored.

    Raises:
        ValueError: the folder holds the embeddings of another CLAP, kind or precision.
    """

    def __init__(self, folder: Path, clap_fingerprint: str, embed_dim: int, kind: str, dtype: str = "float32"):
        self.folder = Path(folder) / f"{kind}-{dtype}-{clap_fingerprint[:12]}"
        self.embed_dim = embed_dim
        self.dtype = np.dtype(dtype)
        self.encoded = 0  # by this process
        self._parts: list[np.ndarray] = []  # (items, embed_dim) each, on disk
        self._read_files: set[str] = set()
        self._keys = np.empty(0, dtype=f"V{KEY_BYTES}")
        self._check_description(
            {
                "format_version": FORMAT_VERSION,
                "clap_fingerprint": clap_fingerprint,
                "embed_dim": embed_dim,
                "kind": kind,
                "dtype": dtype,
            }
        )
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def _check_description(self, own: dict) -> None:
        path = self.folder / DESCRIPTION_FILE
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(own, indent=1).encode())
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no valid JSON: {error}") from error
        for name, value in own.items():
            if found.get(name) != value:
                raise ValueError(
                    f"The cached embeddings in {self.folder} have the {name} {found.get(name)!r}, but this run's is "
                    f"{value!r}. They cannot be mixed: name another cache_dir, or remove that folder."
                )

    def refresh(self) -> None:
        """Takes in the parts that other processes have written since."""
        for path in sorted(self.folder.glob("*.arrow")):
            if path.name in self._read_files:
                continue
            try:
                table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
                keys, embeddings = table["key"].chunk(0), table["embedding"].chunk(0)
            except (pa.ArrowInvalid, KeyError, IndexError) as error:
                raise ValueError(f"{path} is no part of an embedding cache: {error}; remove it.") from error
            keys = np.frombuffer(keys.buffers()[1], dtype=self._keys.dtype, count=len(keys))
            rows = embeddings.flatten().to_numpy(zero_copy_only=True).reshape(len(keys), -1)
            if rows.shape[1] != self.embed_dim or rows.dtype != self.dtype:
                raise ValueError(
                    f"{path} holds {rows.dtype} embeddings of width {rows.shape[1]}, expected {self.dtype} of "
                    f"{self.embed_dim}."
                )
            self._keys = np.concatenate([self._keys, keys])
            self._parts.append(rows)
            self._read_files.add(path.name)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._order = np.argsort(self._keys)
        self._sorted = self._keys[self._order]

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Row numbers `(len(keys),)` of keys, -1 where one is missing."""
        if not len(self._sorted):
            return np.full(len(keys), -1)
        # 5 million keys at once would need as many temporaries; the sorted search goes by pieces.
        found = np.empty(len(keys), dtype=np.int64)
        for start in range(0, len(keys), 1 << 18):
            piece = keys[start : start + (1 << 18)]
            places = np.minimum(np.searchsorted(self._sorted, piece), len(self._sorted) - 1)
            found[start : start + len(piece)] = np.where(self._sorted[places] == piece, self._order[places], -1)
        return found

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """`(len(rows), embed_dim)` in float32."""
        rows = np.asarray(rows)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        out = np.empty((len(rows), self.embed_dim), dtype=np.float32)
        for part in np.unique(parts):
            chosen = parts == part
            out[chosen] = self._parts[part][rows[chosen] - self._starts[part]]
        return out

    def add(
        self,
        keys: np.ndarray,
        costs: np.ndarray,
        encode: Callable[[np.ndarray], np.ndarray],
        ranks: Ranks | None = None,
        unit: str = "text",
    ) -> np.ndarray:
        """Encodes what is missing, and returns the rows of all keys.

        Args:
            keys (`np.ndarray` of shape `(items,)`): from `content_keys`; repeated ones are encoded once.
            costs (`np.ndarray` of shape `(items,)`): lengths, by which the items are sorted so that little is padded.
            encode (callable): indices `(part,)` into `keys` to their embeddings `(part, embed_dim)`.
            ranks (`Ranks`, *optional*): the missing ones are dealt out over the ranks.
            unit (`str`): what an item is, for the progress bar.

        Returns:
            `np.ndarray` of shape `(items,)`: rows, for `embeddings`.
        """
        ranks = ranks or Ranks()
        distinct, first = np.unique(keys, return_index=True)
        missing = first[self.rows(distinct) < 0]
        missing = missing[np.argsort(costs[missing], kind="stable")]
        part_size = min(ITEMS_IN_PART, -(-len(missing) // ranks.count)) or 1
        parts = [missing[start : start + part_size] for start in range(0, len(missing), part_size)]
        own = parts[ranks.index :: ranks.count]
        ranks.wait()  # every rank has decided what is missing before any adds to it
        with tqdm(total=sum(map(len, own)), desc=f"CLAP {unit} embeddings", unit=unit, delay=2, disable=None) as bar:
            for indices in own:
                self._write_part(keys[indices], encode(indices))
                self.encoded += len(indices)
                bar.update(len(indices))
        ranks.wait()
        self.refresh()
        return self.rows(keys)

    def _write_part(self, keys: np.ndarray, embeddings: np.ndarray) -> None:
        if embeddings.shape != (len(keys), self.embed_dim):
            raise ValueError(f"Got embeddings of shape {embeddings.shape}, expected {(len(keys), self.embed_dim)}.")
        if not np.isfinite(embeddings).all():
            raise ValueError("CLAP gave embeddings with NaN or infinite values.")
        flat = pa.array(embeddings.astype(self.dtype).reshape(-1))
        table = pa.table(
            {
                "key": pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(keys.tobytes())]
                ),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, self.embed_dim),
            }
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        name = hashlib.blake2b(keys.tobytes(), digest_size=KEY_BYTES).hexdigest()
        write_atomically(self.folder / f"{name}.arrow", sink.getvalue())


def write_atomically(path: Path, content: bytes | pa.Buffer) -> None:
    """A file that appears whole or not at all, also where several processes write it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


__all__ = ["EmbeddingCache", "Ranks", "content_keys", "write_atomically"]
