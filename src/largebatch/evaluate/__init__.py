"""Evaluation: SQuAD, classification, masked words and next sentences."""
