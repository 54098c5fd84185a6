"""The parts of a training run that `train_minimal.py` puts together."""
