"""Model cards and pushing: what a run says of itself when it is shared."""
