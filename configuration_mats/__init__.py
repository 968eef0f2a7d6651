"""Configurations of MATS and of its CLAP encoder; the lowest layer."""

from transformers import AutoConfig

from configuration_mats.configuration_mats import MatsConfig
from configuration_mats.configuration_msclap import MsClapConfig

AutoConfig.register("mats", MatsConfig, exist_ok=True)
AutoConfig.register("msclap", MsClapConfig, exist_ok=True)

__all__ = ["MatsConfig", "MsClapConfig"]
