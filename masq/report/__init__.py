"""Records of runs, their provenance, and tables made from them."""
