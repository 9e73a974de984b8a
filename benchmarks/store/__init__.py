"""What reading a store costs, against other formats of the same features."""
