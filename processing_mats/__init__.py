from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor

__all__ = ["MsClapFeatureExtractor"]
