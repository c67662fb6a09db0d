"""What is made of the agent to install it: an image, a Debian package, manifests for Kubernetes."""
