"""The colony: follows the agents of a cluster, keeps what they see, and answers questions."""
