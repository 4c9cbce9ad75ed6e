"""One paper, one file; one table of all of them."""
