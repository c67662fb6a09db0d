"""The agent's network interfaces: gRPC and Prometheus."""
