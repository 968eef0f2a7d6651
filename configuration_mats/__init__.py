"""Configurations of MATS and of its CLAP encoder; the lowest layer."""

from configuration_mats.configuration_msclap import MsClapConfig

__all__ = ["MsClapConfig"]
