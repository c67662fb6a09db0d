"""Where agents are: in a list, in a file, by names in DNS, behind a Service of Kubernetes."""
