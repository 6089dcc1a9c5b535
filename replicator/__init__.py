"""What goes on in the background: sends deliveries, ends what is over, collects bytes.

    jobs          the list of what runs; a new job is one line there
    loop          intervals, backoff, the stop signal: the only module that waits
    runner        one process per ROOT that runs the loop, and its heartbeat
    deliveries    sends what is due          callbacks      one signed POST
    destinations  which addresses may be called             names     resolving without waiting
    sweeping      sweep, forget, collect, upkeep            scrubbing     reads all blobs again
    cli           replicate run, once, status

The only package with asyncio. It meets the gateway in the catalog and nowhere else. The
mirror of blobs and journal will be jobs of it; they are not built yet.
"""
