"""What NVIDIA DFM itself says of 1,766 sets of overrides, recorded from its own script, and what dfmspec says of the same."""
