"""dfmspec: one YAML file for a Megatron diffusion-training run; checked, compiled, run and written down."""

__version__ = "0.1.0"
