"""What the paper does not have. README.md has a line per file, and the findings."""
