"""Exact rewrites of a block before rounding: smoothing shared, per modality, or learned."""
