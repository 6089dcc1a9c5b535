"""What the tests of the mirror stand on: a real S3 server, and a proxy that brings bad luck."""
