"""One file a command; each turns arguments into a spec, calls one library function and prints."""
