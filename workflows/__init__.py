"""What workflow engines need of a store: events that wake, approvals, webhooks, payloads, memos.

Stands on `cas` and is served by `gateway`. Nothing is here yet: it comes with the event
gateway.
"""
