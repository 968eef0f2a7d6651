"""From sound and text to model inputs: reading, CLAP, Santa, the processor and the pipeline."""

from transformers import AutoFeatureExtractor, AutoModelForMultimodalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

import modeling_mats  # noqa: F401  (the pipeline needs the model classes registered)
from configuration_mats import MatsConfig, MsClapConfig
from processing_mats.audio_mats import cut_windows, load_audio
from processing_mats.clap_mats import ClapEncoder
from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor
from processing_mats.pipeline_mats import AudioTextToTextPipeline
from processing_mats.processing_mats import MatsProcessor
from processing_mats.santa_mats import SantaMemory

AutoFeatureExtractor.register(MsClapConfig, MsClapFeatureExtractor, exist_ok=True)
AutoProcessor.register(MatsConfig, MatsProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "audio-text-to-text", AudioTextToTextPipeline, pt_model=(AutoModelForMultimodalLM,), type="multimodal"
)

__all__ = [
    "AudioTextToTextPipeline",
    "ClapEncoder",
    "MatsProcessor",
    "MsClapFeatureExtractor",
    "SantaMemory",
    "cut_windows",
    "load_audio",
]
