"""Programs for chips that are not there: memory, traffic and time before anything is run."""
