"""Triton kernels. Imported only where there is a GPU; each has its plain PyTorch beside it, where it is called."""
