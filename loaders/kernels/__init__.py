"""One file per way to multiply by a quantized weight, and the table that chooses among them."""
