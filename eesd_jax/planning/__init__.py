"""Plans for chips that are not there: compiles the real programs and says their memory, traffic and least time."""
