"""Committed checkpoints: writing, finding and loading the whole state of a training."""
