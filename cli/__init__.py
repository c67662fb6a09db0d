"""The `coral` command, on the client."""
