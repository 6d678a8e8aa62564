"""What heads and networks agree on, layer by layer."""
