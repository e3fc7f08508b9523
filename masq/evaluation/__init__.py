"""Scores: tasks answered through generation, and fidelity to the float model by modality."""
