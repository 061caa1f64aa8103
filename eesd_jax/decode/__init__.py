"""One round of speculation, draft, verify, accept, learn, and the loop over rounds. No text, no files, no printing."""
