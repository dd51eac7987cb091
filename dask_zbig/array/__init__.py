"""What NumPy users see."""
