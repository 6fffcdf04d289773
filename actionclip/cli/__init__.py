"""The commands: arguments in, library calls, exit code out. Only they print."""
