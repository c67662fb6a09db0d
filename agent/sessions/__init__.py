"""Sessions: which may start, how long they run, what they may use, how they end."""
