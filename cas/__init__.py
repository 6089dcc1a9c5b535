"""The engine of blobcask: blobs named by their SHA-256, and the catalog that names them.

Knows no HTTP, no S3 and no asyncio; every other package of blobcask stands on this one.
Begin with `cas.store.Store`; `cas.errors` is the page of all errors, `cas.records` the
page of all records.
"""

__version__ = "0.1.0"
