"""What goes on in the background: sends deliveries, ends what is over, collects bytes.

    jobs          the list of what runs; a new job is one line there
    loop          intervals, backoff, the stop signal: the only module that waits
    runner        one process per ROOT that runs the loop, and its heartbeat
    deliveries    sends what is due          callbacks      one signed POST
    destinations  which addresses may be called             names     resolving without waiting
    sweeping      sweep, forget, collect, upkeep            scrubbing     reads all blobs again
    targets       the seam to the places that blobs go to: folder, s3
    links         opens them                 reaching, probe       what each honours
    mirror        copies blobs               removing, verify      deletes, compares
    shipping      the journal, under fence   restoring, drilling   the way back
    fetching      brings evicted bytes       evicting, healing     lets go, brings back
    canary, signs whether all of it works    cli                   blobcask replicate

The only package with asyncio. It meets the gateway in the catalog, in ROOT's files and on
ROOT/replicator.sock, and nowhere else.
"""
