"""What a MATS checkpoint answers about labelled sounds."""
