"""The agent and its machine: privileges, processes by service name, statistics of programs."""
