"""`largebatch bench`: optimizer step, BERT step and data pipeline, each beside the peers that are installed."""
