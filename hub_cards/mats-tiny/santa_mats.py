"""Santa: the memory that moves an audio embedding towards the text embeddings which the model was trained on.

Section 3.3 of the paper, Eq. 6 and 7. Inference only.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SANTA_FILE_NAME = "santa_memory.safetensors"
FORMAT = "santa_memory"
FORMAT_VERSION = 1
TENSOR_NAMES = ("centroids", "cluster_offsets", "embeddings", "text_bytes", "text_offsets")
# Above this, k-means on mini-batches: the full algorithm would take minutes for no better clusters.
MINI_BATCH_KMEANS_ABOVE = 50_000


@dataclass
class SantaOutput:
    """
    embeds (`torch.FloatTensor` of shape `(batch, dim)`): the moved embeddings, not normalised.
    indices (`torch.LongTensor` of shape `(batch, top_k)`): memory rows used, nearest first; -1 where a cluster is
        smaller than `top_k`.
    weights (`torch.FloatTensor` of shape `(batch, top_k)`): their weights, each row summing to 1 (0 where unused).
    """

    embeds: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor


class SantaMemory:
    """Noisy text embeddings in clusters, with their texts.

    Rows are sorted by cluster: cluster `c` holds rows `cluster_offsets[c]:cluster_offsets[c + 1]`.

    Args:
        embeddings (`torch.FloatTensor` of shape `(memory, dim)`): in any floating type; computed with in float32.
        centroids (`torch.FloatTensor` of shape `(clusters, dim)`)
        cluster_offsets (`torch.LongTensor` of shape `(clusters + 1,)`)
        texts (`Sequence[str]`): one per row.
        clap_fingerprint (`str`): identity of the CLAP that made the embeddings; see [`ClapEncoder.fingerprint`].
        noise_variance (`float`): variance of the noise inside the embeddings.
        seed (`int`): seed of that noise and of k-means.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        centroids: torch.Tensor,
        cluster_offsets: torch.Tensor,
        texts: Sequence[str],
        clap_fingerprint: str,
        noise_variance: float,
        seed: int,
    ):
        self.embeddings = embeddings
        self.centroids = centroids
        self.cluster_offsets = cluster_offsets
        self.texts = list(texts)
        self.clap_fingerprint = clap_fingerprint
        self.noise_variance = noise_variance
        self.seed = seed
        self._validate()

    def __len__(self) -> int:
        return len(self.embeddings)

    def __repr__(self) -> str:
        return (
            f"SantaMemory({len(self)} texts, {len(self.centroids)} clusters, {self.embeddings.shape[1]} dimensions, "
            f"noise variance {self.noise_variance}, seed {self.seed}, CLAP {self.clap_fingerprint[:12]})"
        )

    def _validate(self) -> None:
        size, clusters = len(self.embeddings), len(self.centroids)
        if self.embeddings.ndim != 2 or size == 0:
            raise ValueError(f"A memory holds (texts, dim) embeddings, got shape {tuple(self.embeddings.shape)}.")
        if not self.embeddings.is_floating_point():
            raise ValueError(f"A memory's embeddings are floats, got {self.embeddings.dtype}.")
        if self.centroids.ndim != 2 or self.centroids.shape[1] != self.embeddings.shape[1] or clusters == 0:
            raise ValueError(
                f"Centroids have shape {tuple(self.centroids.shape)}, expected (clusters, {self.embeddings.shape[1]})."
            )
        offsets = self.cluster_offsets
        if offsets.shape != (clusters + 1,) or offsets[0] != 0 or offsets[-1] != size or (offsets.diff() <= 0).any():
            raise ValueError(f"Cluster offsets must rise from 0 to {size} in {clusters} steps, without empty clusters.")
        if len(self.texts) != size:
            raise ValueError(f"The memory has {size} embeddings but {len(self.texts)} texts.")
        if not (torch.isfinite(self.embeddings).all() and torch.isfinite(self.centroids).all()):
            raise ValueError("The memory holds NaN or infinite values.")

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        text_embeds: torch.Tensor,
        clap_fingerprint: str,
        num_clusters: int = 100,
        noise_variance: float = 0.015,
        renormalize: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> "SantaMemory":
        """Adds the training noise to the texts' embeddings and clusters them by k-means.

        Args:
            texts (`Sequence[str]`): Texts drawn from the training texts (the paper: 5172).
            text_embeds (`torch.FloatTensor` of shape `(len(texts), dim)`): CLAP's embeddings of them, L2-normalised.
            clap_fingerprint (`str`): Of the CLAP that made them.
            num_clusters (`int`): K (the paper: 100).
            noise_variance (`float`): As in training, so that the memory lies where the model learnt to listen.
            renormalize (`bool`): Normalise again after the noise, as in training.
            seed (`int`): Of noise and k-means.
            dtype (`torch.dtype`): In which the embeddings are kept, in memory and on disk; all is computed in float32.
        """
        # Only building needs it. transformers demands every import outside of `try` of whoever loads remote code.
        try:
            from sklearn.cluster import KMeans, MiniBatchKMeans
        except ImportError as error:
            raise ImportError("Building a Santa memory needs scikit-learn: pip install scikit-learn.") from error

        if len(texts) != len(text_embeds):
            raise ValueError(f"Got {len(texts)} texts but {len(text_embeds)} embeddings.")
        if not 1 <= num_clusters <= len(texts):
            raise ValueError(f"num_clusters is {num_clusters}, expected 1 to {len(texts)}, the number of texts.")
        if noise_variance < 0:
            raise ValueError(f"noise_variance is a variance, it cannot be negative: {noise_variance}.")
        generator = torch.Generator().manual_seed(seed)
        embeddings = text_embeds.detach().to("cpu", torch.float32)
        if noise_variance:
            embeddings = embeddings + torch.randn(embeddings.shape, generator=generator) * noise_variance**0.5
        if renormalize:
            embeddings = F.normalize(embeddings, dim=-1)
        algorithm = MiniBatchKMeans if len(texts) > MINI_BATCH_KMEANS_ABOVE else KMeans
        labels = algorithm(num_clusters, n_init=1, random_state=seed).fit_predict(embeddings.numpy())
        # k-means can leave a cluster empty where texts repeat; the ones that are left are numbered anew.
        _, labels = np.unique(labels, return_inverse=True)
        order = np.argsort(labels, kind="stable")
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(np.bincount(labels))]))
        embeddings = embeddings[torch.from_numpy(order)]
        centroids = torch.stack([cluster.mean(0) for cluster in embeddings.split(offsets.diff().tolist())])
        kept = [texts[i] for i in order]
        return cls(embeddings.to(dtype), centroids, offsets, kept, clap_fingerprint, float(noise_variance), seed)

    def __call__(
        self,
        audio_embeds: torch.Tensor,
        weight: float = 0.3,
        temperature: float = 0.1,
        top_k: int = 32,
        use_kmeans: bool = True,
        use_memory: bool = True,
        use_audio: bool = True,
    ) -> SantaOutput:
        """Eq. 6 and 7: `(1 - weight) * z + weight * sum_i softmax_i(z . m_i / temperature) * m_i`.

        Args:
            audio_embeds (`torch.FloatTensor` of shape `(batch, dim)`): CLAP audio embeddings z, L2-normalised.
            weight (`float`): lambda, the share of the memory.
            temperature (`float`): tau.
            top_k (`int`): L, how many memory rows are averaged; a smaller cluster gives all it has.
            use_kmeans (`bool`): `False` searches the whole memory instead of the nearest cluster.
            use_memory (`bool`): `False` leaves the embeddings as they are; what would have been used is still reported.
            use_audio (`bool`): `False` is `weight=1`, the memory alone.
        """
        check_santa_settings(weight, temperature, top_k)
        if audio_embeds.ndim != 2 or audio_embeds.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"audio_embeds has shape {tuple(audio_embeds.shape)}, expected (batch, {self.embeddings.shape[1]})."
            )
        z = audio_embeds.to("cpu", torch.float32)
        indices = self._nearest(z, top_k, use_kmeans)
        memory = self.embeddings[indices].float()  # (batch, top_k, dim); row -1 is masked out below
        scores = (memory @ z.unsqueeze(-1)).squeeze(-1) / temperature
        weights = scores.masked_fill(indices < 0, -torch.inf).softmax(-1)
        if not use_memory:
            moved = z
        else:
            share = weight if use_audio else 1.0
            moved = (1 - share) * z + share * (weights.unsqueeze(-1) * memory).sum(1)
        return SantaOutput(moved.to(audio_embeds.device, audio_embeds.dtype), indices, weights)

    def _nearest(self, z: torch.Tensor, top_k: int, use_kmeans: bool) -> torch.Tensor:
        """Rows of the nearest memories by Euclidean distance, nearest first, `(batch, <= top_k)`, -1 as filler."""
        if not use_kmeans:
            return self._nearest_in(z, 0, len(self), top_k)
        clusters = squared_distances(z, self.centroids).argmin(1)
        sizes = self.cluster_offsets.diff()
        indices = torch.full((len(z), min(top_k, int(sizes[clusters].max()) if len(z) else 0)), -1)
        for cluster in clusters.unique().tolist():
            start, end = self.cluster_offsets[cluster : cluster + 2].tolist()
            rows = (clusters == cluster).nonzero().squeeze(1)
            found = self._nearest_in(z[rows], start, end, top_k)
            indices[rows, : found.shape[1]] = found
        return indices

    def _nearest_in(self, z: torch.Tensor, start: int, end: int, top_k: int) -> torch.Tensor:
        distances = squared_distances(z, self.embeddings[start:end].float())
        # Stable, so that equal distances always give the earlier row.
        return distances.sort(dim=1, stable=True).indices[:, :top_k] + start

    def explain(self, output: SantaOutput) -> list[list[dict[str, str | float]]]:
        """For each audio the texts Santa leaned on, as `{"text", "weight"}`, heaviest first."""
        explanations = []
        for indices, weights in zip(output.indices.tolist(), output.weights.tolist(), strict=True):
            used = [(i, w) for i, w in zip(indices, weights, strict=True) if i >= 0]
            used.sort(key=lambda pair: -pair[1])
            explanations.append([{"text": self.texts[i], "weight": w} for i, w in used])
        return explanations

    def save_pretrained(self, save_directory: str | os.PathLike) -> Path:
        """Writes `santa_memory.safetensors` into the folder and returns its path."""
        path = Path(save_directory) / SANTA_FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded = [text.encode() for text in self.texts]
        tensors = {
            "embeddings": self.embeddings.contiguous(),
            "centroids": self.centroids.contiguous(),
            "cluster_offsets": self.cluster_offsets.contiguous(),
            "text_bytes": torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8),
            "text_offsets": torch.from_numpy(np.concatenate([[0], np.cumsum([len(text) for text in encoded])])),
        }
        header = {
            "format_version": FORMAT_VERSION,
            "clap_fingerprint": self.clap_fingerprint,
            "noise_variance": self.noise_variance,
            "seed": self.seed,
        }
        # A half-written memory must never carry the name of a whole one.
        partial = path.with_name(path.name + ".partial")
        try:
            # One entry of metadata: safetensors shuffles several, and the same memory should be the same file.
            save_file(tensors, partial, {FORMAT: json.dumps(header)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SantaMemory":
        """Reads a memory from a `.safetensors` file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a memory, a newer format, or contents that contradict each other.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No such Santa memory: {path}")
        try:
            with safe_open(path, "pt") as file:
                header = (file.metadata() or {}).get(FORMAT)
                if header is None:
                    raise ValueError(f"{path} is a safetensors file but not a Santa memory.")
                tensors = {name: file.get_tensor(name) for name in TENSOR_NAMES if name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        try:
            return cls._from_file(json.loads(header), tensors)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{path} cannot be read as a Santa memory: {error}") from error

    @classmethod
    def _from_file(cls, header: dict, tensors: dict[str, torch.Tensor]) -> "SantaMemory":
        version = header["format_version"]
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"it has format {version}, this version of MATS reads up to {FORMAT_VERSION}; a newer one may read it."
            )
        if missing := sorted(set(TENSOR_NAMES) - set(tensors)):
            raise ValueError(f"it lacks {', '.join(missing)}.")
        return cls(
            tensors["embeddings"],
            tensors["centroids"].to(torch.float32),
            tensors["cluster_offsets"].long(),
            _split_texts(tensors["text_bytes"], tensors["text_offsets"]),
            header["clap_fingerprint"],
            float(header["noise_variance"]),
            int(header["seed"]),
        )


def check_santa_settings(weight: float, temperature: float, top_k: int) -> None:
    """Raises `ValueError` for settings outside of what Eq. 6 and 7 allow."""
    if not 0 <= weight <= 1:
        raise ValueError(f"Santa's weight (lambda) is {weight}, expected 0 to 1.")
    if not temperature > 0:
        raise ValueError(f"Santa's temperature (tau) is {temperature}, expected a positive number.")
    if top_k < 1:
        raise ValueError(f"Santa's top_k (L) is {top_k}, expected at least 1.")


def squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances `(len(a), len(b))`, less `|a|^2`, which no comparison along a row needs."""
    return b.square().sum(1) - 2 * a @ b.T


def _split_texts(text_bytes: torch.Tensor, text_offsets: torch.Tensor) -> list[str]:
    offsets, data = text_offsets.tolist(), text_bytes.numpy().tobytes()
    if not offsets or offsets[0] != 0 or offsets[-1] > len(data) or any(a > b for a, b in pairwise(offsets)):
        raise ValueError("text offsets do not fit the text bytes")
    return [data[start:end].decode() for start, end in pairwise(offsets)]


__all__ = ["SANTA_FILE_NAME", "SantaMemory", "SantaOutput", "check_santa_settings"]
