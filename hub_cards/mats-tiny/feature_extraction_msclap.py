"""Waveform to log-mel spectrogram, as CLAP 2023 computes it."""

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank


class MsClapFeatureExtractor(SequenceFeatureExtractor):
    r"""Power STFT (Hann window, centred, reflected), mel filters, `10 log10` with a floor of 1e-10, by `torch.stft`.

    The defaults are those of the *weights* of CLAP 2023, not of its configuration file: msclap builds its filters with
    `sr=32000, fmax=14000` and applies them to 44.1 kHz audio (microsoft/CLAP issue #38), and the checkpoint carries
    that bank. `mel_sampling_rate` keeps the quirk visible.

    Args:
        feature_size (`int`, defaults to 64): Mel bins.
        sampling_rate (`int`, defaults to 44100): Rate of the waveforms, in hertz.
        window_seconds (`float`, defaults to 7.0): Length that the audio tower sees, in seconds.
        fft_window_size (`int`, defaults to 1024): STFT window and FFT length, in samples.
        hop_length (`int`, defaults to 320): STFT hop, in samples.
        frequency_min, frequency_max (`float`, default to 50 and 14000): Range of the mel filters, in hertz.
        mel_sampling_rate (`int`, defaults to 32000): Rate for which the mel filters are laid out, in hertz.
    """

    model_input_names = ["input_features"]

    def __init__(
        self,
        feature_size: int = 64,
        sampling_rate: int = 44100,
        window_seconds: float = 7.0,
        fft_window_size: int = 1024,
        hop_length: int = 320,
        frequency_min: float = 50,
        frequency_max: float = 14000,
        mel_sampling_rate: int = 32000,
        padding_value: float = 0.0,
        **kwargs,
    ):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.window_seconds = window_seconds
        self.fft_window_size = fft_window_size
        self.hop_length = hop_length
        self.frequency_min = frequency_min
        self.frequency_max = frequency_max
        self.mel_sampling_rate = mel_sampling_rate
        self.mel_filters = mel_filter_bank(
            num_frequency_bins=fft_window_size // 2 + 1,
            num_mel_filters=feature_size,
            min_frequency=frequency_min,
            max_frequency=frequency_max,
            sampling_rate=mel_sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        ).astype(np.float32)  # (frequency bins, mel bins)

    @property
    def window_samples(self) -> int:
        """Length of one window in samples."""
        return round(self.window_seconds * self.sampling_rate)

    def to_dict(self) -> dict:
        # The filters follow from the other fields.
        output = super().to_dict()
        output.pop("mel_filters", None)
        return output

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | list,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """
        Args:
            raw_speech (`np.ndarray`, `torch.Tensor`, or a list of them):
                Mono waveforms of shape `(samples,)`, or a batch `(batch, samples)`. A waveform shorter than the window
                is repeated until the window is full, as msclap does. Longer ones are for
                [`~processing_mats.audio_mats.cut_windows`] to cut, and are refused here.
            sampling_rate (`int`): Rate of the waveforms; it must be this extractor's.

        Returns:
            `BatchFeature`: `input_features` of shape `(batch, 1, frames, feature_size)`, in dB.

        Raises:
            ValueError: the rate is missing or another one; there is no waveform; one is empty, not mono, too long, not
                of floats, or not finite.
        """
        if sampling_rate is None:
            raise ValueError(f"sampling_rate is missing; this extractor expects {self.sampling_rate} Hz.")
        if sampling_rate != self.sampling_rate:
            raise ValueError(f"Got audio at {sampling_rate} Hz, this extractor expects {self.sampling_rate} Hz.")
        if isinstance(raw_speech, (np.ndarray, torch.Tensor)) and raw_speech.ndim == 1:
            raw_speech = [raw_speech]
        if len(raw_speech) == 0:
            raise ValueError("Got no waveform, expected at least one.")
        windows = torch.stack([self._fill_window(torch.as_tensor(waveform)) for waveform in raw_speech])
        features = self.log_mel(windows).unsqueeze(1)
        return BatchFeature({"input_features": features}, tensor_type=return_tensors)

    def _fill_window(self, waveform: torch.Tensor) -> torch.Tensor:
        if waveform.ndim != 1 or len(waveform) == 0:
            raise ValueError(f"Expected mono waveforms of shape (samples,), got shape {tuple(waveform.shape)}.")
        if len(waveform) > self.window_samples:
            raise ValueError(
                f"Got {len(waveform)} samples, the window holds {self.window_samples}; cut longer audio into windows."
            )
        if not waveform.is_floating_point():
            raise ValueError(f"Got samples of type {waveform.dtype}, expected floats in [-1, 1].")
        if not waveform.isfinite().all():
            raise ValueError(f"Got {int((~waveform.isfinite()).sum())} samples that are NaN or infinite.")
        repeats = -(-self.window_samples // len(waveform))
        return waveform.to(torch.float32).repeat(repeats)[: self.window_samples]

    def log_mel(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows `(batch, samples)` to log-mel spectrograms `(batch, frames, feature_size)` in dB."""
        spectrum = torch.stft(
            windows,
            n_fft=self.fft_window_size,
            hop_length=self.hop_length,
            window=torch.hann_window(self.fft_window_size, device=windows.device),
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        power = spectrum.real.square() + spectrum.imag.square()  # (batch, frequency bins, frames)
        filters = torch.from_numpy(self.mel_filters).to(windows.device)
        mel = power.transpose(1, 2) @ filters
        return 10 * torch.log10(mel.clamp(min=1e-10))


__all__ = ["MsClapFeatureExtractor"]
