"""Calibration data and the statistics that methods ask for, by modality."""
