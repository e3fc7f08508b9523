"""Pure functions of tensors: formats, rounding to integers, exact integer products, linear algebra."""
