"""What NVIDIA DFM itself says of 1,766 sets of overrides, recorded from its script, and what dfmspec says of them."""
