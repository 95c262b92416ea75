"""A stand-in's package."""
