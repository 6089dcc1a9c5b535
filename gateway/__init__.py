"""The HTTP face of the store: a Falcon app under gunicorn.

app        the only wiring                  wsgi      gunicorn as `blobcask serve` runs it
errors     error -> status and code         worker    the gthread worker: heads, bodies, closes
auth       who is calling                   body      request bodies straight from the socket
signing    URLs that carry their right      ranges    conditional and partial requests
uploads, slots, storage, downloads, health  one resource module per noun
upload_page                                 what a person with a link sees
"""
