"""Finds out what the running kernel and this process can do, and explains what they cannot."""
