"""What the toolkit costs, measured beside textbook implementations and the machine's own limits."""
