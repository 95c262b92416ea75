"""From gradients to weights: reduction, the fused update, the averaged weights."""
