"""What the trainer's kernels take: numbers that the trainer and the rules need alike, free of torch."""

FP8_ALIGNMENT = 16
"""Every side of an FP8 product is a multiple of it (cuBLAS)."""
FLASH_HEADS = (64, 72, 128)
"""Channels of a head whose gradients by FlashAttention 4 tests on Hopper compare with plain attention."""
