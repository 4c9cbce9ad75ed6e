"""One module a claim: what a run measures, and the tables and figures made from the rows of finished runs."""
