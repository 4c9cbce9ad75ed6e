"""What the example scripts share: the command line, data, models, and what a run leaves behind."""
