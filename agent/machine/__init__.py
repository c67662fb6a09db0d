"""What the agent asks of the machine: privileges, processes by service name, program statistics."""
