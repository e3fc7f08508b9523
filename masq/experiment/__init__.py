"""Experiments: a table or a figure as a list of sweeps, the records that fill it, and the numbers a paper reports."""
