"""The two-pass step on any torch model; it knows nothing of a Trainer."""
