"""Real processes, a real S3 server, and bad luck; judged by lists that the client kept."""
