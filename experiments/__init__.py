"""One module an experiment, each with its own command."""
