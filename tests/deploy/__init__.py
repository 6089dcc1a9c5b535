"""What `deploy/` ships, tried out."""
