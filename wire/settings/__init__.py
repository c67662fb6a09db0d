"""Configuration files as the agent and the colony read them: safely, and refused in their users'
words. The keys themselves are each side's own."""
