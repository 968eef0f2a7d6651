"""MATS itself and the CLAP that it listens with; importing it registers both with transformers' Auto classes."""

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

from configuration_mats import MatsConfig, MsClapConfig
from modeling_mats.modeling_mats import MatsForConditionalGeneration, MatsMapper, MatsPreTrainedModel
from modeling_mats.modeling_msclap import MsClapModel, MsClapPreTrainedModel

for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    auto_class.register(MatsConfig, MatsForConditionalGeneration, exist_ok=True)
AutoModel.register(MsClapConfig, MsClapModel, exist_ok=True)

__all__ = [
    "MatsForConditionalGeneration",
    "MatsMapper",
    "MatsPreTrainedModel",
    "MsClapModel",
    "MsClapPreTrainedModel",
]
