"""From sound and text to model inputs: reading, CLAP, Santa, the processor and the pipeline."""

from transformers import AutoFeatureExtractor, AutoProcessor

from configuration_mats import MatsConfig, MsClapConfig
from processing_mats.audio_mats import cut_windows, load_audio
from processing_mats.clap_mats import ClapEncoder
from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor
from processing_mats.processing_mats import MatsProcessor
from processing_mats.santa_mats import SantaMemory

AutoFeatureExtractor.register(MsClapConfig, MsClapFeatureExtractor, exist_ok=True)
AutoProcessor.register(MatsConfig, MatsProcessor, exist_ok=True)

__all__ = ["ClapEncoder", "MatsProcessor", "MsClapFeatureExtractor", "SantaMemory", "cut_windows", "load_audio"]
