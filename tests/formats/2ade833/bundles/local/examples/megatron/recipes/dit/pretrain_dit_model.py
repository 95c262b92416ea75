"""Pretrain a DiT with Megatron: the how-to's script. All of it is in dfmspec.entry.

    torchrun --nproc-per-node 2 examples/megatron/recipes/dit/pretrain_dit_model.py --dataset-path PATH [key=value ...]
"""

import sys

from dfmspec.entry import main

if __name__ == "__main__":
    sys.exit(main())
