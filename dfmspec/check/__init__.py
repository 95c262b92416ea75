"""Resolved -> findings: the rules, what a project accepts of them, and the forms in which they are reported."""
