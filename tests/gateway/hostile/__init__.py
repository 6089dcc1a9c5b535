"""What bad clients send, by what they send: heads, signatures, names, forms, content."""
