"""Deliveries through NATS JetStream: colonies that follow agents publish them, colonies that store
read them, and each may die at any moment."""
