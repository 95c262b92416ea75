"""The trainer: the only torch code of dfmspec, always another process than the command line."""

import warnings

# megatron-core says at every import, on every rank, that optional packages are absent; the manifest lists what is there.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message=".*torch.distributed.(reduce_scatter|all_gather_into)_tensor.* is deprecated")
