"""The trainer: the only torch code of dfmspec, always another process than the command line."""

import warnings

# megatron-core says at every import, on every rank, that optional packages are absent; the manifest lists those that
# are there.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message=".*Apex is not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated")
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated")
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
warnings.filterwarnings("ignore", message=".*torch.distributed.(reduce_scatter|all_gather_into)_tensor.* is deprecated")
