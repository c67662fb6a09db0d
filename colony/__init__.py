"""The colony: storage and queries over the streams of many agents. Empty as yet."""
