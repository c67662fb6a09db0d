"""Following agents: where they are, what runs there, and the account of every session's events.

It hands `Delivery` objects to a `Sink`, and knows neither how they are stored nor who asks for
them.
"""
