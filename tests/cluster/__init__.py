"""A real Kubernetes on this machine, in a network namespace of its own: `make test-cluster`."""
