from modeling_mats.modeling_msclap import MsClapModel, MsClapPreTrainedModel

__all__ = ["MsClapModel", "MsClapPreTrainedModel"]
