"""The workflow that README asks people with: a decision, what follows from it, and what follows
whichever way it went."""

from highway_dsl import Workflow, WorkflowBuilder


def get_workflow() -> Workflow:
    builder = WorkflowBuilder(name="payment")
    builder.task(
        "ask",
        "tools.workflow.request_approval",
        kwargs={
            "approval_key": "payment",
            "title": "Pay {{amount}} EUR to {{payee}}?",
            "addressees": ["ada@example.org", "Bob"],
            "expires_in": 86400,
        },
        result_key="decision",
    )
    # The step has completed, whatever was decided: a condition looks at it.
    builder.condition(
        "approved",
        condition="{{decision.status}} == 'approved'",
        if_true=lambda way: way.task(
            "order",
            "tools.storage.store",
            kwargs={
                "name": "order",
                "data": "{{amount}} EUR to {{payee | upper}}",
                "content_type": "text/plain",
            },
            result_key="letter",
        ),
        if_false=lambda way: way.task(
            "refuse",
            "tools.storage.store",
            kwargs={
                "name": "refusal",
                "data": "No money: {{decision.status}}",
                "content_type": "text/plain",
            },
            result_key="letter",
        ),
    )
    # A join: it names the end of each way, and the way that was not taken counts for nothing.
    builder.task(
        "link",
        "tools.storage.get_url",
        kwargs={"storage_ref": "{{letter.storage_ref}}"},
        result_key="letter_url",
        dependencies=["order", "refuse"],
    )
    return builder.build()
