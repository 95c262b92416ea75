"""What a secret looks like: the names that variables and keys of secrets have, and the forms of well-known tokens."""

from __future__ import annotations

import re
from functools import lru_cache

# Matched whole, and compiled when first asked for: most commands never ask.
_NAME = r"(?i)(?:.*_)?(?:api_?key|access_?key|token|secret|password|wandb_key)"
_TOKENS = (
    r"hf_[A-Za-z0-9]{30,}",
    r"sk-[A-Za-z0-9_-]{20,}",
    r"gh[pousr]_[A-Za-z0-9]{30,}",
    r"AKIA[0-9A-Z]{16}",
    r"nvapi-[\w-]{20,}",
)


@lru_cache(maxsize=4096)
def names_a_secret(name: str) -> bool:
    """Whether a variable or a key of this name holds a secret."""
    return re.fullmatch(_NAME, name) is not None


def is_a_token(text: str) -> bool:
    """Whether a text has the form of a token of Hugging Face, OpenAI, GitHub, AWS or NVIDIA."""
    return any(re.fullmatch(token, text) for token in _TOKENS)
