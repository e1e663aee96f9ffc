"""Pure torch numerics of quantization; imports torch and nothing else of this project."""
