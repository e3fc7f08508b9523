"""Checkpoints that others can load: masq's own packed format through transformers, and compressed-tensors."""
