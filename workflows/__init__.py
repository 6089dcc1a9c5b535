"""What workflow engines need of a store: events that wake, approvals, webhooks, tools, runs.

Stands on `cas` and is served by `gateway`. All that must not be lost is in the catalog.

    views         the tenant-scoped ways in: `Workflows`
    events        waits and events             watcher       wakes who waits, one thread a process
    approvals     questions to people          mails         what is mailed to them
    webhooks      addresses for others' calls  signatures    how those prove who they are
    secrets       what tenants share with others
    definitions   a workflow as written in highway_dsl, checked
    templates     the {{ }} in it              runs          what became of each step
    tools         what steps call              engine        runs of a ROOT on stabilize
    embedded      tools over an open store     remote        tools behind a gateway
"""
