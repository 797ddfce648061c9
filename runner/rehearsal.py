"""What every run does, whatever its config; imported where trials are forked, so that none has to do it."""

from contextlib import suppress

from runner import report

with suppress(ImportError):  # over a thousand patterns for the names of weights are compiled, and kept
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("")
for page in ("report.html.jinja", "card.md.jinja"):
    report.template(page)
