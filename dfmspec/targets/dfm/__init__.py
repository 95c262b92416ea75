"""NVIDIA DFM at 7cb7634: its three scripts as targets, Megatron-Bridge as it pins it, and a model of how it reads."""


class Refused(Exception):
    """Upstream stops here, with this reason."""
