"""One file per command: each turns its arguments into a spec, calls one library function and prints the result."""
