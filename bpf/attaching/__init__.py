"""Attaches loaded programs to their hooks."""
