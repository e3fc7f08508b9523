"""Where low bits hurt: which linear role, which decoder block, weights or activations, and for which modality."""
