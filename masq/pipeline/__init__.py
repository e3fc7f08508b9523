"""The loop over decoder blocks: statistics, smoothing, rounding, compensation, one block at a time."""
