"""One file for each format: its tensors, its arithmetic, its limits and what it says of itself."""
