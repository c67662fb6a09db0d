"""Sessions: who may start one, how long it runs, what it may use, and how it ends."""
