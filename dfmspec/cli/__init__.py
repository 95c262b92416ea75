"""The command line: one file a command, thin bodies; nothing here imports torch."""
