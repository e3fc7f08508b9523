"""Models behind one contract: roles of linears, blocks, the modality of every token; one file per family."""
