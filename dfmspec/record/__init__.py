"""What a run leaves: its directory, manifest, events, checkpoints, and the verdict on it."""
