"""What is worth doing now: knows no tensors and reads no clock."""
