"""What the CPU benchmark measures, one module a family of operations."""
