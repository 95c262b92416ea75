"""text -> Document -> Spec -> Resolved: reading, structure, layers, derived values; edits and imports of specs."""
