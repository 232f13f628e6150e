"""One module per command: parse the arguments, call an operation, show its result."""
