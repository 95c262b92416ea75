"""What a dataset says of itself, without torch: Energon's metadata, blends, shards, tensors, packing."""
