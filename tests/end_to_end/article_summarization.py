"""The workflow that must run as it is written: papers in, a digest out."""

from highway_dsl import WorkflowBuilder


def get_workflow():
    builder = WorkflowBuilder(name="arxiv_summarization")
    # Step 1: Request PDF upload (3 arxiv papers)
    builder.task(
        "request_pdfs",
        "tools.storage.request_upload",
        kwargs={
            "name": "arxiv_papers",
            "allowed_types": ["pdf"],
            "max_files": 3,
            "prompt": "Upload 3 arxiv PDF papers for summarization",
            "retention_policy": "days:7",
            "expires_in": 3600
        },
        result_key="upload_request"
    )
    # Step 2: Wait for upload (test will upload programmatically)
    builder.task(
        "wait_for_pdfs",
        "tools.workflow.wait_for_event",
        kwargs={
            "event_name": "{{upload_request.event_name}}",
            "timeout_seconds": 3600
        },
        result_key="uploaded_files",
        dependencies=["request_pdfs"]
    )
    # Step 3: ForEach - Summarize each PDF in parallel
    builder.foreach(
        "summarize_papers",
        items="{{uploaded_files.files}}",
        loop_body=lambda fb: fb.task(
            "summarize_pdf",
            "tools.llm.call",
            kwargs={
                "model": "gpt-4",
                "prompt": "Summarize this academic paper in 200 words. Include: title, main contribution, methodology, and key findings.",
                "attachments": [{"type": "storage_ref", "ref": "{{item.storage_ref}}"}]
            },
            result_key="summary"
        ),
        dependencies=["wait_for_pdfs"]
    )
    # Step 4: Combine all summaries into single document
    builder.task(
        "combine_summaries",
        "tools.llm.call",
        kwargs={
            "model": "gpt-4",
            "prompt": "Combine these paper summaries into a cohesive research digest document:\n\n{{summarize_papers.results}}"
        },
        result_key="combined_summary",
        dependencies=["summarize_papers"]
    )
    # Step 5: Store combined summary as txt file
    builder.task(
        "store_summary",
        "tools.storage.store",
        kwargs={
            "name": "research_digest",
            "data": "{{combined_summary.content}}",
            "content_type": "text/plain",
            "retention_policy": "days:30"
        },
        result_key="stored_file",
        dependencies=["combine_summaries"]
    )
    # Step 6: Get public download URL
    builder.task(
        "get_public_url",
        "tools.storage.get_url",
        kwargs={
            "storage_ref": "{{stored_file.storage_ref}}",
            "expires_in": 86400
        },
        result_key="public_url",
        dependencies=["store_summary"]
    )
    # Step 7: Return final result
    builder.task(
        "finalize",
        "tools.shell.run",
        args=["echo 'Workflow complete. Download your summary at: {{public_url}}'"],
        result_key="final_result",
        dependencies=["get_public_url"]
    )
    return builder.build()
