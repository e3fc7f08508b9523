"""The same small text-only slice quantized by other packages, and compared with masq: grids, scales, codes, factors."""
