"""Candidates beyond MASQuant: probes, a gate on layers, a gate on the whole decoder, a report."""
