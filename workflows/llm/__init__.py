"""Language models for `tools.llm.call`: a provider that is asked, or sentences picked here.

    attachments  what a call brings besides its prompt     documents  the text of files
    provider     any OpenAI-compatible server              pdf_process  a PDF's, safely
    extractive   the model local/extractive

What an attachment says is data. It is put between marks that its author cannot know, after a
sentence that says so; but a model that is asked may still follow what it reads there, so that
its answer is worth no more trust than the attachment.
"""
