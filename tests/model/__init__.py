"""State machines that drive the store beside an oracle."""
