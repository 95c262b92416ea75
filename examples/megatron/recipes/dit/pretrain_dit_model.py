"""Pretrain a DiT with Megatron: the how-to's script. All of it is in dfmspec.entry.

    torchrun --nproc-per-node 2 examples/megatron/recipes/dit/pretrain_dit_model.py --dataset-path PATH [key=value ...]
"""

import sys

try:
    from dfmspec.entry import main
except ModuleNotFoundError as missing:
    if missing.name != "dfmspec":
        raise
    print(
        f"error: {sys.executable} on this node finds no dfmspec; run: pip install 'dfmspec[train]' there, or name the "
        "interpreter that has it with launcher.python",
        file=sys.stderr,
    )
    sys.exit(4)

if __name__ == "__main__":
    sys.exit(main())
