"""Questions to the colony: named queries and SQL over what is stored, each answer with what it
covers."""
