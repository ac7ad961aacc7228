"""What lies between the matrix products of a layer."""
