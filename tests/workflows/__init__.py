"""Events, approvals, webhooks, tools and runs, on real parts."""
