"""What a block is made of besides megatron-core: GEMMs, attention, FP8, CUDA graphs, kernels."""
