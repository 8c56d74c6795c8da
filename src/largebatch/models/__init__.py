"""The models of the paper: BERT and the vision networks."""
