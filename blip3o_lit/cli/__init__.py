"""The front of all commands: overrides, schema, help, Ctrl-C; all that composes with Hydra."""
