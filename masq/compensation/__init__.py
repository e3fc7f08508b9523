"""From the error that rounding left to a correction of it."""
