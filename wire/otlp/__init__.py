"""Metrics as OTLP has them, and their way to a receiver: agents and colonies send them alike."""
