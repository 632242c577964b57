"""The command line. Parses, calls a stage, renders; each command imports its stage in its own body."""
