"""SQL of strangers: one SELECT, in a process of its own that can reach the colony's rows and
nothing else, with limits of memory and time."""
