"""Streams: batches are numbered, encoded once, filtered, queued and accounted for."""
