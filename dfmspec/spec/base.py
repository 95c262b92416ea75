"""What every section of a spec shares: strict, frozen, documented fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of the spec; an unknown key or a value of another type is an error.

    The docstring of a field is its description in the schema, in the documentation and in `dfmspec explain`; one that
    is longer than a line is cut into adjacent strings in parentheses.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def derived() -> Any:
    """A field that a spec may leave out or set to null, and that has a value in every configuration.

    The models here are the configuration as resolved: what the trainer is given, with nothing left to fill in. That the
    spec as written may have null stands in the schema alone, which `tools/generate.py` makes of the mark.
    """
    return Field(default=None, json_schema_extra={"x-derived": True})


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""A number of things of which there is at least one."""
NonNegativeInt = Annotated[int, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
