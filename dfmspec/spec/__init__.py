"""The spec's sections as models: the source of the schemas, of the documentation, and of the trainer's typed view."""
