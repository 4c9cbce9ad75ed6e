"""The algebra: vectors over named parameters, what a method keeps, and the rules that methods are composed of."""
