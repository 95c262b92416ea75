"""The diffusion transformer, on megatron-core's blocks, and its weights as one file."""
