"""Ways over the modality gap besides Santa: corrections of audio embeddings by the statistics of the two modalities.

The paper has none of them. They need sound, unlabelled, and texts, but no pairs: `fit` sees audio embeddings of some
clips and text embeddings, and the result moves an audio embedding to where texts lie.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

Correction = Callable[[torch.Tensor], torch.Tensor]

# Covariances of a few hundred clips in a few hundred dimensions are singular; so much of each is replaced by its mean
# variance in every direction.
SHRINKAGE = 0.3


def fit_mean_gap(audio: torch.Tensor, text: torch.Tensor) -> Correction:
    """Subtracts the difference of the modalities' means (Liang et al., 2022, section 4.2).

    Args:
        audio (`torch.Tensor` of shape `(clips, dim)`), text (`torch.Tensor` of shape `(texts, dim)`): L2-normalised.

    Returns:
        A function from `(batch, dim)` to `(batch, dim)`, L2-normalised.
    """
    gap = audio.mean(0) - text.mean(0)
    return lambda embeds: F.normalize(embeds - gap, dim=-1)


def fit_whitening(audio: torch.Tensor, text: torch.Tensor) -> Correction:
    """Whitens by the audio embeddings' mean and covariance and colours by the texts' (correlation alignment, Sun et
    al., 2016). Arguments and result as of `fit_mean_gap`."""
    whiten, colour = _power(_covariance(audio), -0.5), _power(_covariance(text), 0.5)
    audio_mean, text_mean = audio.mean(0), text.mean(0)
    return lambda embeds: F.normalize((embeds - audio_mean) @ whiten @ colour + text_mean, dim=-1)


CORRECTIONS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], Correction]] = {
    "mean_gap": fit_mean_gap,
    "whitening": fit_whitening,
}


def _covariance(embeds: torch.Tensor) -> torch.Tensor:
    """`(dim, dim)`, shrunk towards a multiple of the identity."""
    covariance = embeds.double().T.cov()
    mean_variance = covariance.diagonal().mean()
    return (1 - SHRINKAGE) * covariance + SHRINKAGE * mean_variance * torch.eye(len(covariance), dtype=torch.double)


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return ((vectors * values.clamp(min=0) ** exponent) @ vectors.T).float()


__all__ = ["CORRECTIONS", "Correction", "fit_mean_gap", "fit_whitening"]
