"""What FBGEMM computes faster than oneDNN: recurrent layers, and products of a few rows."""
