"""Language models for `tools.llm.call`: a provider that is asked, or sentences picked here.

    attachments  what a call brings besides its prompt     documents     the text of files
    provider     any OpenAI-compatible server              local         the model local/extractive
    confined     work on strangers' texts, with limits     text_process  the process that does it:
                                                           pdf_text, extractive

What an attachment says is data. It is put between marks that no author can know, after a
sentence that says so; but a model that is asked may still follow what it reads there, so that
its answer is worth no more trust than the attachment.
"""
