"""Training an exit branch: the target writes text, and the branch learns its distribution on it."""
