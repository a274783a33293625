"""What one stored number may be, and the bytes that numbers become."""
