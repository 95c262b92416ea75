"""Committed checkpoints: snapshots of a training, taken, written, and loaded into another layout."""
