"""Each module is one step: a file (or the network) to a new file and a `StepRecord`."""
