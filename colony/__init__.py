"""The colony: storage and queries over the streams of many agents, on the client. Comes later."""
